"""The warping network: what the two pictures tell the denoising UNet, computed once per request."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from icportrait.nn.control_unet import ControlUNet
from icportrait.nn.matching import best_match, cost_volume, gather_features, join_canvas, split_canvas
from icportrait.nn.matching_head import MatchingHead
from icportrait.presets import Preset


class WarpingNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers isn't typed
    """View-consistent adaptation of arXiv 2501.17159, figure 3, as a diffusers model component.

    Two control UNets with separate weights see the canvas [profile | hidden reference]: the matching net finds where
    each position of the reference comes from in the profile, the appearance net gives the features that are moved
    there. One flow per resolution serves all residuals of that resolution.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, geometry: dict[str, Any]) -> None:
        """Build the network.

        Args:
            geometry: ``Preset.to_dict()``, a dictionary so that it can be stored in ``config.json``.
        """
        super().__init__()
        self.preset = preset = Preset.from_dict(geometry)
        self.matching_net = ControlUNet(preset)
        self.appearance_net = ControlUNet(preset)
        self.zero_convs = nn.ModuleList(
            nn.Conv2d(residual.channels, residual.channels, kernel_size=1) for residual in preset.residuals
        )
        self._reset_zero_convs()
        # The last residual of each resolution: it has seen most of the canvas.
        levels = [residual.level for residual in preset.residuals]
        self.matching_residuals = [len(levels) - 1 - levels[::-1].index(level) for level in range(preset.levels)]
        self.matching_head = MatchingHead(preset.unet_channels)
        prompt_shape = (1, preset.prompt_tokens, preset.cross_attention_dim)
        self.prompt_embedding: Tensor
        self.register_buffer("prompt_embedding", torch.zeros(prompt_shape))

    def forward(
        self,
        profile_latent: Tensor,
        reference_latent: Tensor,
        visibility: Tensor,
        known_flows: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute ``F_ref`` and the correspondence it rests on.

        Args:
            profile_latent: the profile, [batch, latent_channels, s, s], scaled by the VAE factor.
            reference_latent: the hidden reference, [batch, latent_channels, s, s], scaled likewise.
            visibility: 1 where the reference may be seen, 0 where it is hidden, [batch, 1, s, s].
            known_flows: [batch, s_L^2] int64 for each level, finest first: warp by these and not by the matches found.

        Returns:
            ``f_ref_NN`` [batch, C_k, s_k, 2 s_k] in the weights' type, then ``flow_L`` [batch, s_L, s_L] int32 (y * s_L
            + x in the profile's grid), finest first, then ``match_confidence`` [batch] float32, the mean over the
            finest level's positions of the best cosine similarity.
        """
        canvas = self.canvas(profile_latent, reference_latent, visibility)
        matches = [best_match(cost_volume(source, target)) for source, target in self.matching_features(canvas)]
        appearance = self.appearance_net(canvas, self.prompt_embedding)
        f_ref = self.inject(appearance, known_flows or [flow for flow, _ in matches])

        sizes = [self.preset.level_size(level) for level in range(self.preset.levels)]
        flows = [flow.to(torch.int32).view(-1, size, size) for (flow, _), size in zip(matches, sizes, strict=True)]
        _, finest_confidence = matches[0]
        return (*f_ref, *flows, finest_confidence.mean(dim=1))

    def canvas(self, profile_latent: Tensor, reference_latent: Tensor, visibility: Tensor) -> Tensor:
        """Join ``forward``'s arguments into both nets' input.

        Returns:
            [batch, latent_channels + 1, s, 2 s] in the weights' type.
        """
        latents = join_canvas(profile_latent, reference_latent)
        visible = join_canvas(torch.ones_like(visibility), visibility)
        return torch.cat((latents, visible), dim=1).to(self.matching_net.conv_in.weight.dtype)

    def matching_features(self, canvas: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute the features to match, of profile and reference: each [batch, D, s_L, s_L], finest level first."""
        features = self.matching_net(canvas, self.prompt_embedding)
        halves: list[tuple[Tensor, Tensor]] = self.matching_head(
            [split_canvas(features[residual]) for residual in self.matching_residuals]
        )
        return halves

    def inject(self, appearance: list[Tensor], flows: list[Tensor]) -> list[Tensor]:
        """Warp the appearance features and project them: zero_conv_k([A_s | warp(A_s) + A_t]).

        Args:
            appearance: [batch, C_k, s_k, 2 s_k] for each residual.
            flows: [batch, s_L^2] int64 for each level, finest first.

        Returns:
            ``F_ref``, [batch, C_k, s_k, 2 s_k] for each residual.
        """
        f_ref = []
        for zero_conv, features, residual in zip(self.zero_convs, appearance, self.preset.residuals, strict=True):
            source, target = split_canvas(features)
            target = gather_features(source, flows[residual.level]) + target
            f_ref.append(zero_conv(join_canvas(source, target)))
        return f_ref

    @classmethod
    def from_unet(cls, preset: Preset, unet: UNet2DConditionModel, prompt_embedding: Tensor) -> WarpingNetwork:
        """Start from a diffusion UNet: both nets are copies of its encoder and ``F_ref`` is zero.

        Args:
            preset: the UNet's geometry.
            unet: the diffusion UNet.
            prompt_embedding: [1, tokens, cross_attention_dim].
        """
        with torch.device("meta"):  # every value is set below, so none is drawn first
            network: WarpingNetwork = cls(preset.to_dict())
        network.to_empty(device=unet.device)
        network.matching_net.copy_encoder(unet)
        network.appearance_net.copy_encoder(unet)
        network.matching_head.reset()
        network._reset_zero_convs()
        network.prompt_embedding.copy_(prompt_embedding)
        network.eval()
        return network

    @torch.no_grad()
    def _reset_zero_convs(self) -> None:
        for parameter in self.zero_convs.parameters():
            parameter.zero_()
