"""The models that Triton's Python backend loads, and all that they share with the gateway.

    stages          the pipeline's stages but the engines, as plain objects
    denoise         the denoising loop as a stage, with its leases and previews
    admission       leases: which requests are let in
    control         the line between the gateway and the denoising loop
    triton_models   the way between Triton's requests and the stages
    encoder_cache   rows that the VAE's encoder has encoded before
    numerics        the id of servers that give equal bytes

Triton's threads call the models. The loop's own thread calls back into ``denoise``, and a thread for answers delivers
what it says.
"""
