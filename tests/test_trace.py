"""Where time goes: intervals by hand, texts by hand, and a profile of a real run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax import trace


def test_time_in_which_several_run_is_divided():
    found = trace.shares([(0.0, 4.0, "a"), (1.0, 3.0, "b"), (2.0, 3.0, "b"), (6.0, 7.0, "a")])
    assert found == pytest.approx({"a": 1 + 1 / 2 + 1 / 3 + 1 + 1, "b": 1 / 2 + 2 / 3})
    assert sum(found.values()) == pytest.approx(4 + 1)


def test_no_operation_is_longer_than_its_result_is_waited_for():
    late = [
        (0.0, 9.0, "a"),
        (1.0, 9.0, "b"),
        (2.0, 9.0, "a"),
        (4.0, 5.0, "b"),
        (4.5, 6.0, "c"),
        (7.0, 9.0, "a"),
    ]
    found = trace.cut(late, {"a": {"b", "c"}, "b": {"d"}})
    assert found == [(0, 1, "a"), (1, 4, "b"), (2, 4, "a"), (4, 5, "b"), (4.5, 6, "c"), (7, 9, "a")]


def test_a_fusion_belongs_to_what_is_within_it():
    nowhere, somewhere = "jit(step)/add", "jit(step)/jvp(MagNet)/stage_1/mul"
    assert trace._name([nowhere, "", somewhere, "jit(step)/optimizer/mul"]) == somewhere
    assert trace._name([somewhere, "jit(step)/optimizer/mul"]) == somewhere
    assert trace._name([nowhere, ""]) == nowhere


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(train_step)/jvp(MagNet)/image_fusion_0/pyramid_1/pwam/mul", "fusion (CAM)"),
        ("jit(train_step)/transpose(jvp(MagNet))/text.layers/layer_0/fc1/dot", "BERT"),
        ("jit(train_step)/jvp(MagNet)/embeddings/word/jit(_take)/gather", "BERT"),
        ("jit(train_step)/jvp(MagNet)/decoder/layer_3/attn/while/body/add", "deformable attention"),
        (
            "jit(gradient)/transpose(jvp(MagNet))/decoder/while/body/closed_call/PixelDecoderLayer/attn/dot",
            "deformable attention",
        ),
        ("jit(gradient)/PixelDecoderLayer/attn/broadcast_in_dim", "deformable attention"),
        ("jit(train_step)/jvp(MagNet)/decoder/layer_3/fc1/dot", "pixel decoder"),
        ("PixelDecoderLayer/norm2/reduce_sum", "pixel decoder"),
        ("PredictorLayer/cross_attn/reduce_max", "mask predictor"),
        ("jit(train_step)/jvp(Lavt)/stage_2/block_11/attn/qkv/dot", "Swin stage 3"),
        ("jit(train_step)/jvp(MagNet)/merge_1/reduction/dot", "Swin patches"),
        ("jit(train_step)/jvp(MaskGrounding)/layer_0/fc1/dot", "Mask Grounding"),
        ("jit(train_step)/transpose(jvp(losses))/reduce", "losses"),
        ("jit(train_step)/optimizer/add", "optimizer"),
        ("jit(train_step)/add", "other"),
    ],
)
def test_parts_by_name(name, part):
    assert trace.part_of(name) == part


class Work:
    """A program with two parts, one of which multiplies larger matrices."""

    def __call__(self, x, y):
        with jax.named_scope("losses"):
            a = jnp.sin(x @ x)
        with jax.named_scope("optimizer"):
            b = jnp.tanh(y @ y)
        return a.sum() + b.sum()


def test_profile_of_a_real_run(tmp_path):
    x, y = np.ones((64, 64), np.float32), np.ones((1024, 1024), np.float32)
    compiled = jax.jit(Work()).lower(x, y).compile()
    file = trace.record(tmp_path, lambda: jax.block_until_ready(compiled(x, y)))
    assert file.is_relative_to(tmp_path)
    assert list(tmp_path.rglob("*perfetto*"))
    found = trace.seconds_by_part(file, compiled.as_text())
    assert set(found) <= {"optimizer", "losses", "other"}
    assert found["optimizer"]["forward"] > found["losses"]["forward"] > 0
    assert found["optimizer"]["backward"] == 0
    assert next(iter(found)) == "optimizer"  # In the order of `PARTS`.
