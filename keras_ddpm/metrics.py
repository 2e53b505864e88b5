"""Distances between sets of images, in the features of a network: KID and FID.

    >>> kid = keras_ddpm.metrics.KernelInceptionDistance()
    >>> for batch in held_out:
    ...     kid.update_state(real_images=batch)
    >>> kid.update_state(generated_images=model.sample(2000, seed=0))
    >>> kid.result(), kid.standard_error()

Images are float arrays `(num, height, width, channels)` in [-1, 1], used as given: rounding samples to 8 bits is the
caller's. What is collected stays in float64 on the host, so the metrics are called like this, not compiled into a
model. A number means something beside its n, its extractor and the number for as many real images: see
`describe`.

To add one, write a subclass of `_Distance`.
"""

import hashlib
import pathlib

import keras
import numpy as np

from keras_ddpm import checks


class Extractor:
    """From images to features.

    Args:
        model: a Keras model from images to vectors, the path of one, or `None` for the average-pooled features of
            InceptionV3 trained on ImageNet, whose weights are downloaded at first use.

    Attributes:
        name: that of the model.
        hash: twelve digits of the SHA-256 of its weights.

    Raises:
        ConnectionError: if InceptionV3's weights cannot be had.
        ValueError: if the model does not make vectors.
    """

    def __init__(self, model=None):
        self.inception = model is None
        if self.inception:
            try:
                inception = keras.applications.InceptionV3(include_top=False, pooling="avg", input_shape=(299, 299, 3))
            except Exception as error:  # of many kinds
                raise ConnectionError(
                    "InceptionV3's weights cannot be downloaded. Give an `extractor`: a Keras model from images to "
                    f"features, such as a classifier of the same data without its last layer. {error}"
                ) from error
            # Resized batch by batch: thousands of images of 299x299 at once would fill the memory.
            x = keras.Input((None, None, 3))
            resized = keras.layers.Resizing(299, 299, antialias=True)(x)
            model = keras.Model(x, inception(resized), name=inception.name)
        elif not isinstance(model, keras.Model):
            model = keras.saving.load_model(model)
        if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.output_shape) != 2:
            raise ValueError(f"An extractor has one input and makes one vector of each. Received: {model.name}")
        self.model = model
        self.name = model.name
        digest = hashlib.sha256()
        for weight in model.get_weights():
            digest.update(np.ascontiguousarray(weight).tobytes())
        self.hash = digest.hexdigest()[:12]

    def __call__(self, images, batch_size=64):
        """Features, float64 `(num, dim)`; ValueError for images that are none or do not fit the model."""
        images = checks.array(images, "images")
        if images.ndim != 4 or not len(images):
            raise ValueError(f"Expected images (num, height, width, channels). Received: shape {images.shape}")
        if not np.all(np.isfinite(images)):
            raise ValueError("The images hold NaN or infinite values.")
        if self.inception and images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        expected = self.model.input_shape[1:]
        if any(size not in (None, got) for size, got in zip(expected, images.shape[1:], strict=True)):
            raise ValueError(f"The extractor {self.name} takes images {expected}. Received: {images.shape[1:]}")
        return self.model.predict(images, batch_size=batch_size, verbose=0).astype("float64")


class _Distance(keras.metrics.Metric):
    """What distances have in common: the features of two sets, collected in some form.

    A subclass says what it keeps of one set (`_empty`, `_add`), and makes a number of two.
    """

    def __init__(self, extractor, name):
        super().__init__(name=name)
        self.extractor = extractor if isinstance(extractor, Extractor) else Extractor(extractor)
        self.reset_state()

    def update_state(self, real_images=None, generated_images=None, sample_weight=None):
        """Adds images to either set or to both.

        Args:
            real_images: `(num, height, width, channels)` in [-1, 1], or `None`.
            generated_images: as many or another number.
            sample_weight: not supported.

        Raises:
            ValueError: for images that are none, hold NaN or do not fit the extractor.
        """
        if sample_weight is not None:
            raise ValueError("The distance of sets knows no weights of images.")
        if real_images is not None:
            self._real = self._add(self._real, self.extractor(real_images))
        if generated_images is not None:
            self._generated = self._add(self._generated, self.extractor(generated_images))

    def reset_state(self):
        self._real = self._empty()
        self.reset_generated()

    def reset_generated(self):
        """Forgets the generated images, for the next model or epoch."""
        self._generated = self._empty()

    def save_real(self, path):
        """Writes what is known of the real images, to a `.npz` file."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"metric": type(self).__name__, "extractor": self.extractor.name, "hash": self.extractor.hash}
        np.savez(path, **about, **self._real)

    def load_real(self, path):
        """Reads what `save_real` has written, in place of the real images so far.

        Raises:
            ValueError: for a file of another metric or extractor.
        """
        with np.load(path) as file:
            arrays = dict(file)
        found = [str(arrays.pop(key, "?")) for key in ("metric", "extractor", "hash")]
        expected = [type(self).__name__, self.extractor.name, self.extractor.hash]
        if found[::2] != expected[::2]:
            raise ValueError(f"{path} is of {' '.join(found)}. Expected: {' '.join(expected)}")
        self._real = arrays

    def describe(self):
        """A dict of the value, its standard error, both n, and the name and hash of the extractor."""
        return {
            self.name: self.result(),
            "standard_error": self.standard_error(),
            "num_real": self._num(self._real),
            "num_generated": self._num(self._generated),
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
        }


@keras.saving.register_keras_serializable(package="keras_ddpm")
class KernelInceptionDistance(_Distance):
    """KID: the squared maximum mean discrepancy of features under the kernel (x·y / dim + 1)³, without bias.

    The smaller set is cut at random into k disjoint subsets of at least `subset_size` images, the larger one into as
    many; the value is the mean of the k distances, as defined (often it is reported times 1000), and its mean over
    sets is 0 where both come from the same distribution. The standard error is that of the mean of the k distances.

    Args:
        extractor: see `Extractor`.
        subset_size: as many images are at least in a subset; at least 2.
        seed: of the cut.
        name: name of the metric.

    Raises:
        ValueError: at `result`, for fewer images than a subset.

    Reference: Bińkowski et al., 2018, Eq. 4 and section 4.
    """

    def __init__(self, extractor=None, subset_size=1000, seed=0, name="kid"):
        if not checks.is_count(subset_size, low=2):
            raise ValueError(f"`subset_size` must be an integer of at least 2. Received: subset_size={subset_size!r}")
        self.subset_size = subset_size
        self.seed = seed
        super().__init__(extractor, name)

    def _empty(self):
        return {"features": np.empty((0, 0))}

    def _add(self, state, features):
        kept = state["features"]
        return {"features": np.concatenate([kept, features]) if len(kept) else features}

    def _num(self, state):
        return len(state["features"])

    def _distances(self):
        sets = self._real["features"], self._generated["features"]
        num = min(map(len, sets)) // self.subset_size
        if num < 1:
            raise ValueError(
                f"Fewer images than a subset of {self.subset_size}. Received: {len(sets[0])} real and {len(sets[1])} "
                "generated ones"
            )
        random = np.random.default_rng(self.seed)
        parts = [np.array_split(features[random.permutation(len(features))], num) for features in sets]
        return [_squared_discrepancy(x, y) for x, y in zip(*parts)]

    def result(self):
        return float(np.mean(self._distances()))

    def standard_error(self):
        """Of `result`, a Python float; NaN where there is one subset."""
        distances = self._distances()
        return float(np.std(distances, ddof=1) / len(distances) ** 0.5) if len(distances) > 1 else float("nan")


def _squared_discrepancy(x, y):
    """The unbiased estimate from features `(n, dim)` and `(m, dim)`."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@keras.saving.register_keras_serializable(package="keras_ddpm")
class FrechetInceptionDistance(_Distance):
    """FID: the squared 2-Wasserstein distance between Gaussians with the features' means and covariances.

    It falls with the number of images, so that only values at the same n can be compared. The standard error is a
    jackknife: from the values without each tenth of the images.

    Args:
        extractor: see `Extractor`.
        name: name of the metric.

    Raises:
        ValueError: at `result`, for fewer than 2 images in a set; at `standard_error`, for fewer than 20.

    Reference: Heusel et al., 2017, Eq. 6.
    """

    num_groups = 10

    def __init__(self, extractor=None, name="fid"):
        super().__init__(extractor, name)

    def _empty(self):
        return {"num": np.zeros(self.num_groups)}

    def _add(self, state, features):
        """Image number i of a set belongs to group i mod 10."""
        groups = (np.arange(len(features)) + int(state["num"].sum())) % self.num_groups
        added = [_moments(features[groups == group]) for group in range(self.num_groups)]
        if state["num"].any():
            known = zip(state["num"], state["mean"], state["scatter"])
            added = [_merged([old, new]) for old, new in zip(known, added)]
        return dict(zip(("num", "mean", "scatter"), map(np.array, zip(*added))))

    def _num(self, state):
        return int(state["num"].sum())

    def _distance(self, without=None):
        gaussians = []
        for name, state in (("real", self._real), ("generated", self._generated)):
            if self._num(state) < 2:
                raise ValueError(f"A covariance needs at least 2 images. Received: {self._num(state)} {name} ones")
            groups = zip(state["num"], state["mean"], state["scatter"])
            num, mean, scatter = _merged([group for index, group in enumerate(groups) if index != without])
            gaussians.append((mean, scatter / (num - 1)))
        return _frechet_distance(*gaussians)

    def result(self):
        return self._distance()

    def standard_error(self):
        """Of `result`, a Python float."""
        if min(self._num(self._real), self._num(self._generated)) < 2 * self.num_groups:
            raise ValueError(f"The standard error needs at least {2 * self.num_groups} images in each set.")
        values = [self._distance(without=group) for group in range(self.num_groups)]
        return float(np.sqrt((self.num_groups - 1) * np.var(values)))


def _moments(x):
    """Number, mean, and the sum of outer products around it, of `(num, dim)`."""
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    return len(x), mean, (x - mean).T @ (x - mean)


def _merged(moments):
    """The moments of the union. [Chan et al., 1983]"""
    num = sum(n for n, _, _ in moments)
    mean = sum(n * m for n, m, _ in moments) / max(num, 1)
    return num, mean, sum(s + n * np.outer(m - mean, m - mean) for n, m, s in moments)


def _frechet_distance(p, q):
    """Between the Gaussians `(mean, covariance)`; tr √(C D) is that of the symmetric √C D √C."""
    (mean_p, c), (mean_q, d) = p, q
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
    return float(np.sum((mean_p - mean_q) ** 2) + np.trace(c) + np.trace(d) - 2 * cross)
