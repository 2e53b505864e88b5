"""Trains a DDPM on flowers and draws new ones.

    python examples/flowers.py                                  # Oxford Flowers 102, or drawings without a network
    python examples/flowers.py --dataset procedural --epochs 3  # any setting has a flag
    python examples/flowers.py --init runs/flowers/model.keras --learning-rate 1e-4  # fine-tunes a trained model

The `full` preset is the recipe for an accelerator, `cpu` one that ends within ten minutes on two cores.

Everything goes to --output:

    samples/0001.png ...  the same 16 noises, denoised with 20 steps, as training goes on
    history.csv loss.png  the losses; the validation loss is that of the averaged weights
    samples.png           64 samples at the end
    denoising.gif         how 16 of them came out of noise: x_t on the left, the prediction of x_0 on the right
    model.keras           the model with its averaged weights, and the optimizer
"""

import pathlib
import tempfile
import time

import common
import keras
import numpy as np

import keras_ddpm as kd

DATASETS = ["auto", "oxford_flowers102", "procedural"]
NETWORK = {
    "image_size": 64,
    "width": 64,
    "width_multipliers": (1, 2, 4, 8),
    "num_blocks": 2,
    "attention_resolutions": (16,),
    "groups": 8,
    "dropout": 0.0,
    "prediction": "epsilon",
    "schedule": "linear",
    "timesteps": 1000,
    "ema_decay": 0.999,
    "dtype_policy": "auto",
}
TRAINING = {
    "batch_size": 64,
    "epochs": 800,
    "steps_per_epoch": None,
    "learning_rate": 2e-4,
    "warmup_steps": 1000,
    "loss": "mse",
    "grid_every": 10,
    "num_images": 4096,  # procedural flowers
}
PRESETS = {
    "full": {**NETWORK, **TRAINING},
    "cpu": {
        **NETWORK,
        **TRAINING,
        "image_size": 32,
        "width": 24,
        "width_multipliers": (1, 2, 4),
        "num_blocks": 1,
        # In few steps these come further than epsilon and the linear schedule.
        "prediction": "v",
        "schedule": "cosine",
        "ema_decay": 0.99,
        "dtype_policy": "float32",
        "batch_size": 32,
        "epochs": 5,
        "steps_per_epoch": 300,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "grid_every": 1,
        "num_images": 2048,
    },
}


def parse(arguments):
    parser = common.make_parser(__doc__, "flowers")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="auto: by the hardware")
    parser.add_argument("--dataset", default="auto", help="auto, oxford_flowers102, procedural, or a folder of images")
    parser.add_argument("--strict", action="store_true", help="fail on images in the folder that cannot be read")
    parser.add_argument("--init", help="a .keras file to fine-tune: its network and process, a new optimizer")
    choices = {
        "prediction": ["epsilon", "x0", "v"],
        "schedule": ["linear", "cosine"],
        "dtype_policy": ["auto", "float32", "mixed_bfloat16"],
    }
    for name, value in PRESETS["full"].items():
        several = {"nargs": "*"} if isinstance(value, tuple) else {}
        example = value[0] if several else value
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=int if example is None else type(example),
            choices=choices.get(name),
            help="; ".join(f"{preset}: {settings[name]}" for preset, settings in PRESETS.items()),
            **several,
        )
    args = parser.parse_args(arguments)
    if args.dataset not in DATASETS and not pathlib.Path(args.dataset).is_dir():
        parser.error(f"--dataset must be one of {', '.join(DATASETS)} or a folder. Received: {args.dataset}")
    given = [name for name in NETWORK if getattr(args, name) is not None]
    if args.init and given:
        parser.error(f"--init brings its own network and process. Received as well: {', '.join(given)}")
    if args.preset == "auto":
        args.preset = "full" if kd.hardware.has_accelerator() else "cpu"
    print(f"Preset: {args.preset} (choose with --preset {{{','.join(PRESETS)}}}).")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def load_data(args):
    """The training and the held-out batches."""
    options = {"batch_size": args.batch_size, "steps_per_epoch": args.steps_per_epoch}
    name = "oxford_flowers102" if args.dataset == "auto" else args.dataset
    insist = args.dataset == name
    options |= {"strict": args.strict, "num_drawn": args.num_images}
    return common.load(name, args.image_size, args, insist=insist, **options)


def make_model(args):
    if args.init:
        return common.load_model(args.init)
    policy = kd.hardware.dtype_policy() if args.dtype_policy == "auto" else args.dtype_policy
    keras.config.set_dtype_policy(policy)
    network = kd.networks.unet(
        (args.image_size, args.image_size, 3),
        args.width,
        args.width_multipliers,
        args.num_blocks,
        args.attention_resolutions,
        args.groups,
        args.dropout,
    )
    schedule = getattr(kd.schedules, args.schedule)(args.timesteps)
    diffusion = kd.GaussianDiffusion(schedule, args.prediction)
    return kd.DiffusionModel(network, diffusion, args.ema_decay, seed=args.seed)


def main(arguments=None):
    start = time.time()
    args = parse(arguments)
    out = args.output
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--output {out} cannot be written to: {error}") from error
    keras.utils.set_random_seed(args.seed)
    model = make_model(args)
    args.image_size = model.data_shape[0]
    train, validation = load_data(args)
    print(
        f"{train.num_examples} images of {args.image_size}x{args.image_size} to train on and {validation.num_examples} "
        f"held out; {args.epochs} epochs of {len(train)} batches of {args.batch_size}; "
        f"{model.network.count_params():,} parameters; backend {keras.backend.backend()}, "
        f"{model.network.dtype_policy.name}."
    )

    scale = max(1, 128 // args.image_size)
    history = common.train(
        model,
        train,
        args.epochs,
        args.learning_rate,
        args.warmup_steps,
        args.loss,
        validation_data=validation,
        verbose="auto",
        callbacks=[
            kd.callbacks.EMAWeights(),
            kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png", every=args.grid_every, scale=scale),
            keras.callbacks.CSVLogger(out / "history.csv"),
            keras.callbacks.ModelCheckpoint(out / "model.keras"),
        ],
    )
    kd.plots.loss(out / "loss.png", history)

    samples, x_t, x_0 = model.sample(64, seed=args.seed, return_trajectory=20, verbose=1)
    kd.images.save(out / "samples.png", samples, scale)
    frames = [np.concatenate([kd.images.grid(x[:16]), kd.images.grid(y[:16])], axis=1) for x, y in zip(x_t, x_0)]
    kd.images.save_gif(out / "denoising.gif", frames, max(1, scale // 2))
    images_seen = args.epochs * len(train) * args.batch_size
    print(f"Saw {images_seen:,} images in {(time.time() - start) / 60:.1f} minutes. Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
