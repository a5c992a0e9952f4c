"""The capacity planner: how many GPUs a load needs, by a simulation of the server in virtual time.

profile       the times of a server's parts on a GPU and its host, measured or computed
computed      profiles of GPUs by their data sheets, from the table that was measured on an H200
workload      requests: rates, bursts, steps, guidance, deadlines, pictures that return
virtual       virtual time: a heap of events, a device, and the denoising loop's surroundings in it
simulation    a server in virtual time, around the loop's and admission's own code
evaluation    replications of a simulation, and the intervals of their figures
bound         the batch-service bound of arXiv 1912.06322, beside the simulation
question      a plan's question, from a TOML file and flags
planner       the replicas that answer it
answer        the answer as text and as JSON
scaling_rule  Kubernetes' rule by which replicas follow a metric, read from the manifest
fleet         simulated servers with a clock in common, which come and go by that rule
autoscale     a day or a burst on such a fleet, against a fixed number of servers
command       the command line
"""
