"""From an export to a running tritonserver: the model repository, its memory, the processes and their end."""
