"""Networks: functional models from `[x_t, t, *conditions]` to a tensor shaped like `x_t`.

The networks do not depend on the diffusion process. Any `keras.Model` with these inputs and this output can be used
instead. At initialization each network outputs zeros.

The condition is a label or a vector, an image, or both; `conditions.Condition` describes them. The layer
"label_embedding" embeds K labels and, as the last of its K + 1 entries, no label. A vector or an image of zeros is no
condition.

To add a network, write a function that returns a `keras.Model` and uses `embedding.embed` for the time and conditions.
"""

from keras_ddpm.networks.dit import dit
from keras_ddpm.networks.embedding import with_guidance_scale
from keras_ddpm.networks.mlp import mlp
from keras_ddpm.networks.unet import unet

__all__ = ["dit", "layers", "mlp", "unet", "with_guidance_scale"]
