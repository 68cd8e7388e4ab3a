"""The traditional small convolutional network, kept as a baseline that everybody knows."""

from __future__ import annotations

from torch import Tensor, nn

from mvcr_cli.config import Look, ModelConfig
from mvcr_cli.models.scale_set import resize_matrix

GRID = 4


class SmallCNN(nn.Module):
    """Three stages of 3x3 convolution, ReLU and 2x2 max-pool (32, 64, 128 channels), dropout 0.5, dense 64, logits.

    The feature map is resized to 4x4 before the dense layer, so that inputs of every size work.

    Shape: (N, 3, H, W), normalised -> (N, K).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.look: Look = "all"  # it has one view, whichever way it is looked through
        stages: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 128):
            stages += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.dense = nn.Linear(channels * GRID * GRID, 64)
        self.drop = nn.Dropout(config.drop)
        self.fc = nn.Linear(64, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        down, across = (resize_matrix(line, GRID, GRID) for line in (x[0, 0, :, 0], x[0, 0, 0, :]))
        x = (down @ x @ across.T).flatten(1)  # N x 2048
        logits: Tensor = self.fc(self.drop(self.dense(x).relu()))
        return logits

    def forward_views(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.forward(x)
        return logits, [logits]

    def taught_at(self, side: int) -> list[int]:
        return [0]

    def inherit_norms(self, side: int) -> None:
        """There are none."""
