"""
Title: Denoising diffusion of flowers, with labels, guidance and inpainting
Author: The keras_ddpm authors
Date created: 2026/11/29
Last modified: 2026/11/29
Description: Training a DDPM on flowers with `fit`, and editing with it.
Accelerator: GPU
"""

"""
## Introduction

[Denoising diffusion probabilistic models](https://arxiv.org/abs/2006.11239)
(DDPM) learn to remove noise from images. To draw a new image, they start from
pure noise and remove it step by step.

This example trains such a model on photographs of flowers, and shows:

- how noise hides an image, and what the network has to guess;
- training with `fit`, with any optimizer, loss and callback of Keras;
- sampling with 10 network calls in place of 1000;
- asking for a kind of flower, with classifier-free guidance;
- filling in a missing part of a photograph with the same model.

It uses the package `keras_ddpm`, which contains the schedules, networks and
samplers. The code runs on JAX, TensorFlow and PyTorch.
"""

"""shell
git clone REPOSITORY keras_ddpm
pip install -q ./keras_ddpm jax
"""

"""
## Setup
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # or "tensorflow", or "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_ddpm

"""
## Hyperparameters
"""

# Data.
image_size = 64
batch_size = 64

# Network.
width = 48
width_multipliers = (1, 2, 3, 3)
patch_size = 2

# Training.
num_epochs = 60  # the pictures get better up to several hundred
steps_per_epoch = None  # all photographs
learning_rate = 5e-4

"""
## Data

[Oxford Flowers 102](https://www.robots.ox.ac.uk/~vgg/data/flowers/102/) has
8,189 photographs of 102 kinds of flowers. Most of them are in the split that is
called "test", so all three splits are used, and a tenth of each is held out.
The images are cropped to squares and kept in memory with 8 bits. The batches
hold floats in [-1, 1] and mirror half of the images.
"""

train_batches, held_out_batches = keras_ddpm.datasets.oxford_flowers(
    image_size, batch_size, labels=True, steps_per_epoch=steps_per_epoch
)
class_names = train_batches.class_names
photographs = keras_ddpm.images.from_uint8(held_out_batches.x[:8])


def show(images, columns):
    """Draws images in [-1, 1] as a grid."""
    keras_ddpm.plots.show(images, columns)
    plt.show()


show(photographs, columns=8)

"""
## Forward: noise hides the image

At time 0 there is no noise, and at time 1000 there is nothing else. The
schedule says how much of the image and of the noise is left in between.
"""

diffusion = keras_ddpm.GaussianDiffusion(
    keras_ddpm.schedules.cosine(1000), prediction="x0"
)

times = np.array([1, 100, 200, 300, 400, 600, 800, 1000])
noise = np.random.default_rng(0).standard_normal((8, image_size, image_size, 3))
noisy_images = diffusion.q_sample(np.repeat(photographs[:1], 8, axis=0), times, noise)
show(keras.ops.convert_to_numpy(noisy_images), columns=8)

"""
## Network

The network gets the noisy image, the time and the kind of flower, and returns
an image of the same size. It is a U-Net with residual blocks, group
normalization and self-attention at low resolution. The first convolution turns
patches of 2x2 pixels into one, which makes the network four times as fast.

`prediction="x0"` means that the output is the clean image. Predicting the noise
or a mixture of both is possible as well: each can be computed from each other.
"""

network = keras_ddpm.networks.unet(
    (image_size, image_size, 3),
    width=width,
    width_multipliers=width_multipliers,
    num_blocks=1,
    attention_resolutions=(16, 8),
    num_classes=len(class_names),
    patch_size=patch_size,
)

"""
## Training

`DiffusionModel` is a `keras.Model`. For each batch, it draws random times and
noise, and passes a regression problem to the training step of Keras. One label
in ten is dropped, so that the network also learns to do without it.

The model keeps a moving average of the weights, which is used for samples and
for the validation loss.
"""

model = keras_ddpm.DiffusionModel(network, diffusion, ema_decay=0.999)

model.compile(
    loss="mse",
    optimizer=keras.optimizers.Adam(learning_rate, global_clipnorm=1.0),
)
history = model.fit(
    train_batches,
    validation_data=held_out_batches,
    epochs=num_epochs,
    callbacks=[
        keras_ddpm.callbacks.SampleGrid(
            "samples/{epoch:04d}.png", every=10, labels=0, guidance_scale=2.0
        ),
        # If the training is interrupted, the same call of `fit` goes on.
        keras_ddpm.callbacks.Checkpoint("checkpoints"),
    ],
)

plt.plot(history.history["loss"], label="loss")
plt.plot(history.history["val_loss"], label="val_loss")
plt.legend()
plt.show()

"""
## Sampling

Ten network calls are enough. With this spacing, the last steps are short, which
matters for fine detail. The same seed gives the same flowers on every backend.
"""

sampler = keras_ddpm.samplers.UniPC(10, spacing="logsnr")
kinds = np.arange(16) % len(class_names)
show(model.sample(16, sampler, seed=0, labels=kinds), columns=8)

"""
## Guidance

Guidance compares the prediction with the label to the prediction without it,
and goes further in this direction. A scale of 1 is no guidance. Larger scales
give clearer and less varied flowers, for two network calls a step.
"""

for guidance_scale in (1.0, 1.5, 3.0):
    print(f"{class_names[0]}, guidance scale {guidance_scale}")
    samples = model.sample(8, sampler, seed=0, labels=0, guidance_scale=guidance_scale)
    show(samples, columns=8)

"""
## Inpainting

The same model fills in what is missing. The known part gets as much noise as
the unknown part in each step, and both are denoised together.
"""

mask = np.ones((image_size, image_size, 1))
quarter = image_size // 4
mask[quarter:-quarter, quarter:-quarter] = 0  # 0 is to be filled

filled_images = keras_ddpm.editing.inpaint(
    model,
    photographs,
    mask,
    seed=0,
    num_steps=20,
    labels=held_out_batches.labels[:8],
)
show(np.concatenate([photographs * mask, filled_images]), columns=8)

"""
## One file

The file holds the network, the process, all weights and the names of the kinds,
and loads on every backend. The package contains such a file: a model of the
same data and nearly the same network, which has seen 2.6 million images. At the
end, a perceptual loss made it sharper, and it learned to draw with a guidance
scale of 2.5 in one network call a step. So it needs no arguments but labels.
"""

model.save("flowers.keras")
loaded_model = keras_ddpm.saving.load_model("flowers.keras")

trained_model = keras_ddpm.DiffusionModel.from_preset("flowers64")
roses = trained_model.sample(16, seed=0, labels="rose")
show(roses, columns=8)

"""
## What to try next

- Your own pictures: `keras_ddpm.datasets.from_folder("pictures", image_size)`,
  with a subfolder for each kind.
- `prediction="v"` in place of `"x0"`, and other schedules.
- `keras_ddpm.metrics`: distances between samples and held-out photographs, and
  whether samples are copies of training images.

## References

- [Ho et al., 2020](https://arxiv.org/abs/2006.11239), the model.
- [Nichol and Dhariwal, 2021](https://arxiv.org/abs/2102.09672), the schedule.
- [Ho and Salimans, 2022](https://arxiv.org/abs/2207.12598), guidance.
- [Zhao et al., 2023](https://arxiv.org/abs/2302.04867), the sampler.
- [Lugmayr et al., 2022](https://arxiv.org/abs/2201.09865), inpainting.
"""
