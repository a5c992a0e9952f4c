"""IC-Portrait Server: one person's face in another picture's view and light, served by Triton.

A request's way through the package, in order:

1. ``request``    the public inputs are checked and become a ``PortraitRequest``
2. ``imaging``    pictures are decoded, turned upright and cropped; ``masking`` hides most of the reference
3. ``batching``   runs the warping network once, then the denoising loop with ``sampling``
4. ``serving``    the stages of the Triton ensemble as plain objects; ``triton_backend`` adapts them to Triton

``contract`` says what every tensor is, ``presets`` how large, ``runtime`` executes the engines, ``nn`` holds the
torch modules, ``triton_config``, ``repository`` and ``server`` turn exported engines into a running server.
"""

__version__ = "0.1.0"
