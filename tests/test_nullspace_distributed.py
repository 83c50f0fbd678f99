"""NullSpace on several ranks: sums over them when a capture ends, no collective in a step, equal to the single process."""

import pytest
import torch.distributed as dist

from distributed import models, nullspace_checks
from distributed.pool import Pool
from gradproj import NullSpace

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without torch.distributed or gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("way", nullspace_checks.SETTINGS)
@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_the_single_process(pool, world, way):
    pool(world, nullspace_checks.training, way, nullspace_checks.train_alone(way))


def test_what_cannot_be_pinned_on_shards_is_refused_by_name(pool):
    pool(2, nullspace_checks.refused)


def test_file_of_shards(pool, tmp_path):
    model = models.build()
    protection = NullSpace(model, share=0.3)
    with protection.capture():
        models.loss(model(models.batch(0, 1)), 1).backward()
    ranks = {name: basis.rank for name, basis in protection.bases.items()}
    pool(2, nullspace_checks.file, str(tmp_path / "bases.safetensors"), ranks)
    assert NullSpace.load(tmp_path / "bases.safetensors", models.build()).bases["up"].rank == ranks["up"]
