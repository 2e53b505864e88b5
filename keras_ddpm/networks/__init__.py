"""Networks: functional models from `[x_t, t]`, or `[x_t, t, condition]`, to a tensor shaped like `x_t`.

The networks do not depend on the diffusion process. Any `keras.Model` with these inputs and this output can be used
instead. At initialization each network outputs zeros.

The condition is a label or a vector. The layer "label_embedding" embeds K labels and, as the last of its K + 1 entries,
no label. A vector of zeros means no condition.

To add a network, write a function that returns a `keras.Model` and uses `_embedding` for the time and the condition.
"""

from keras_ddpm.networks.dit import dit
from keras_ddpm.networks.mlp import mlp
from keras_ddpm.networks.unet import unet

__all__ = ["dit", "layers", "mlp", "unet"]
