"""Edits images with a trained model.

    python examples/edit.py inpaint photo.jpg --mask mask.png           # fills what is black in the mask
    python examples/edit.py variations photo.jpg --strengths 0.3 0.6    # other images like it
    python examples/edit.py interpolate first.jpg second.jpg            # what lies between two
    python examples/edit.py reconstruct photo.jpg --num-steps 10 50     # to noise and back, and how exactly

The model is that of examples/flowers.py, or any other (--model). Images are cropped and resized to what it was
trained on. Without files, photographs of flowers are taken from --data-dir, of those held out, or without that the
package draws some, others than examples/flowers.py trains on by default.

Writes all the images side by side to --output/COMMAND.png, and each by itself to --output/COMMAND/.
"""

import argparse

import common
import numpy as np

import keras_ddpm as kd


def inpaint(model, x, args, **options):
    size = x.shape[1]
    if args.mask:
        mask = kd.images.load(args.mask, size, channels=1) > 127
    else:
        mask = np.ones((size, size, 1))
        mask[size // 4 : -size // 4, size // 4 : -size // 4] = 0
    masks = np.broadcast_to(mask, (*x.shape[:-1], 1))
    columns = {"image": x, "known": np.where(masks, x, 0)}
    for index in range(args.num):
        seed = args.seed + index
        columns[f"filled, seed {seed}"] = kd.editing.inpaint(
            model, x, masks, seed, num_steps=args.num_steps, num_resamples=args.num_resamples, **options
        )
    return columns


def variations(model, x, args, **options):
    columns = {"image": x}
    for strength in args.strengths:
        columns[f"strength {strength:g}"] = kd.editing.variations(model, x, strength, args.seed, **options)
    return columns


def interpolate(model, x, args, **options):
    if len(x) % 2:
        raise ValueError(f"Images are taken in pairs. Received: {len(x)}")
    between = kd.editing.interpolate(model, x[::2], x[1::2], args.num, num_steps=args.num_steps, **options)
    return {f"{fraction:.0%}": images for fraction, images in zip(np.linspace(0, 1, args.num), between)}


def reconstruct(model, x, args, **options):
    columns = {"image": x}
    for steps in args.num_steps:
        steps = min(steps, model.diffusion.timesteps)
        noise = kd.editing.encode(model, x, num_steps=steps, **options)
        again = kd.editing.decode(model, noise, num_steps=steps, **options)
        error = np.sqrt(np.mean((again - x) ** 2))
        print(f"{steps:5} steps: root of the mean squared error {error:.4f}, of pixels in [-1, 1]", flush=True)
        columns |= {f"x_T,\n{steps} steps": noise / 3, f"{steps} steps,\nerror {error:.3f}": again}
    return columns


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = common.make_parser(None, "edit")
    every.add_argument("images", nargs="*", help="files (default: flowers)")
    every.add_argument(
        "--model", default="runs/flowers/model.keras", help="a trained .keras file (default: %(default)s)"
    )
    every.add_argument("--num-flowers", type=int, default=4, help="without files (default: 4)")
    every.add_argument("--label", type=int, help="class, for a model that knows classes")
    every.add_argument("--guidance-scale", type=float, default=1.0, help="how much the class counts (default: 1)")
    for edit in (inpaint, variations, interpolate, reconstruct):
        command = commands.add_parser(edit.__name__, parents=[every], add_help=False)
        command.set_defaults(edit=edit)
        if edit is inpaint:
            command.add_argument("--mask", help="file: white is known, black to be filled (default: the middle)")
            command.add_argument("--num", type=int, default=4, help="number of fillings (default: %(default)s)")
            command.add_argument("--num-steps", type=int, help="steps of DDPM (default: 50)")
            command.add_argument(
                "--num-resamples", type=int, default=10, help="how often each step is made (default: 10)"
            )
        if edit is variations:
            command.add_argument(
                "--strengths", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0], help="in 0..1"
            )
        if edit is interpolate:
            command.add_argument("--num", type=int, default=7, help="number of images, ends and all (default: 7)")
            command.add_argument("--num-steps", type=int, help="steps of DDIM, each way (default: 100)")
        if edit is reconstruct:
            command.add_argument("--num-steps", type=int, nargs="+", default=[25, 100, 400], help="steps, each way")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    model = common.load_model(args.model)
    size, _, channels = model.data_shape
    if args.images:
        x = kd.images.from_uint8(np.stack([kd.images.load(path, size, channels) for path in args.images]))
    else:
        if channels != 3:
            raise ValueError(f"The flowers are in colour, images of {args.model} are not: give files.")
        if args.data_dir:
            held_out = kd.datasets.oxford_flowers(size, data_dir=args.data_dir)[1]
            x = kd.images.from_uint8(held_out.x[: args.num_flowers])
        else:
            x, _ = kd.datasets.procedural_flowers(args.num_flowers, size, seed=1)
    columns = args.edit(model, x, args, labels=args.label, guidance_scale=args.guidance_scale)
    for column, images in enumerate(columns.values()):
        for row, image in enumerate(images):
            kd.images.save(args.output / args.command / f"{row + 1}-{column + 1}.png", image)
    kd.plots.table(args.output / f"{args.command}.png", {"": columns}, size=1.1)
    print(f"Wrote {args.output / args.command}.png and {args.output / args.command}/.")


if __name__ == "__main__":
    common.run(main)
