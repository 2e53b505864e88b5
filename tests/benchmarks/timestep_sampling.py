"""How much the loss varies from batch to batch, by how t is drawn.

    python tests/benchmarks/timestep_sampling.py MODEL.keras --dataset fashion_mnist

Computes the loss of batches of held-out data with the averaged weights of a trained model, and prints its mean and
variance over the batches.
"""

import argparse

import keras
import numpy as np

import keras_ddpm as kd


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=600)
    args = parser.parse_args()
    trained = keras.saving.load_model(args.model)
    data = kd.datasets.from_tfds(
        args.dataset, "test", trained.data_shape[0], args.data_dir, batch_size=args.batch_size, seed=0
    )
    for timestep_sampling in ("batch", "uniform", "stratified"):
        network = keras.models.clone_model(trained.network)
        network.set_weights([keras.ops.convert_to_numpy(v) for v in trained.ema_weights])
        model = kd.DiffusionModel(network, trained.diffusion, timestep_sampling=timestep_sampling)
        model.compile(loss="mse")
        losses = []
        for index in range(args.batches):
            model.reset_metrics()
            losses.append(float(model.test_on_batch(data[index])))
        print(f"{timestep_sampling:10} mean {np.mean(losses):.4f}, variance {np.var(losses):.2e}", flush=True)


if __name__ == "__main__":
    main()
