"""attention_hopper: the orders that it wants anywhere, by wgmma's tables; what it computes on a GPU."""

import pytest
import torch

from fluxserve.kernels import attention_hopper as hopper
from fluxserve.kernels.attention import plain_attention
from fluxserve.kernels.fp8 import E4M3, cast
from tests.kernels.judge import DEVICE, INTERPRETED, poisoned, random, relative
from tests.kernels.test_attention import SCALES, exact, q_k_v


def accumulator_column(i: int, lane: int) -> int:
    """Of number i that a thread has of a product: wgmma's table for m64nN accumulators; row i / 2 % 2 of two."""
    return i // 4 * 8 + lane % 4 * 2 + i % 2


def operand_column(register: int, byte: int, lane: int) -> int:
    """Of a byte that a thread has of 32 numbers of A: wgmma's table for m64k32; row register % 2 of two."""
    return register // 2 * 16 + lane % 4 * 4 + byte


def test_scores_are_the_operand_as_they_are() -> None:
    """The kernel packs numbers 0, 1, 4, 5 of each 8 and so on into a register; values must have their keys where those
    numbers then count as columns of A."""
    order = hopper.order_of_keys()
    for lane in range(32):
        for i in range(16):  # registers of a tile of 128 keys
            first = i // 4 * 16 + i // 2 % 2 * 8 + i % 2 * 2
            for byte, number in enumerate((first, first + 1, first + 4, first + 5)):
                assert number // 2 % 2 == i % 2, "the row"
                column = i // 4 * 32 + operand_column(i % 4, byte, lane)
                key = column // 16 * 16 + int(order[column % 16])
                assert key == accumulator_column(number, lane)


def test_results_are_neighbours() -> None:
    order = hopper.order_of_dims()
    for lane in range(4):
        columns = [accumulator_column(i, lane) for i in range(32) if i // 2 % 2 == 0]
        assert [int(order[c]) for c in columns] == list(range(16 * lane, 16 * lane + 16))


def test_values_are_transposed_and_nothing_else() -> None:
    v = random(35, 2 * hopper.DIM).clamp(-400, 400).to(E4M3)
    made = hopper.transposed(v).float()
    assert made.shape == (256, 48)
    keys, dims = hopper.order_of_keys(), hopper.order_of_dims()
    for row, key in ((0, 0), (70, 17), (200, 33), (255, 34)):
        place = key // 16 * 16 + int((keys == key % 16).nonzero())
        assert made[row, place] == v[key, row // 64 * 64 + int(dims[row % 64])].float()
    assert (made[:, 32:].count_nonzero(dim=1) <= 3).all(), "three keys and thirteen zeros"


def test_what_it_was_not_built_for_is_refused() -> None:
    qkv = torch.zeros(4, 3 * 128).to(E4M3)
    with pytest.raises(ValueError, match="attention: got 96 columns"):
        hopper.attention(qkv, qkv, 1, torch.ones(4), torch.zeros(4, 96).to(E4M3))
    with pytest.raises(ValueError, match=r"expected \[4, at least 256\] and \[128, 16\]"):
        hopper.attention(qkv, qkv, 1, torch.ones(4), torch.zeros(4, 128).to(E4M3))
    with pytest.raises(ValueError, match="rows at multiples of 16 bytes"):
        hopper.attention(qkv, qkv, 1, torch.ones(4), torch.zeros(4, 130).to(E4M3)[:, :128])


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 17, 128, 129, 300, 512, 4608, 9217])
@pytest.mark.parametrize("heads", [1, 3, 24])
def test_as_the_reference(rows: int, heads: int) -> None:
    """No worse than the same arithmetic done plainly, the same bytes again; what lies beside it is left alone."""
    qkv, scales = q_k_v(rows, heads, E4M3)
    width = heads * hopper.DIM
    values = hopper.transposed(qkv[:, 2 * width :])
    whole, again = (poisoned(rows, 2 * width, dtype=E4M3) for _ in range(2))
    plain = torch.empty(rows, width, device=DEVICE, dtype=E4M3)
    for out in (whole, again):
        hopper.attention(qkv, values, heads, scales, out[:, :width])
    torch.cuda.synchronize()
    plain_attention(qkv, heads, scales, plain)
    expected = exact(qkv, heads, scales)
    allowed = 1.2 * relative(plain.float() * SCALES[2], expected) + 1e-3
    assert relative(whole[:, :width].float() * SCALES[2], expected) <= allowed
    assert torch.equal(whole[:, :width].float(), again[:, :width].float())
    assert torch.isnan(whole[:, width:].float()).all()


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
def test_a_maximum_that_grows_with_every_tile() -> None:
    """Scores from tile to tile larger: sums are multiplied anew each time, and what came first counts for nothing."""
    rows = 700
    q = torch.ones(rows, hopper.DIM, device=DEVICE)
    k = torch.linspace(-2, 2, rows, device=DEVICE)[:, None].expand(rows, hopper.DIM)
    v = random(rows, hopper.DIM, seed=3)
    held = torch.cat([cast(t, E4M3) for t in (q, k, v)], dim=1)
    scales, out = torch.ones(4, device=DEVICE), poisoned(rows, hopper.DIM, dtype=E4M3)
    plain = torch.empty(rows, hopper.DIM, device=DEVICE, dtype=E4M3)
    hopper.attention(held, hopper.transposed(held[:, 2 * hopper.DIM :]), 1, scales, out)
    plain_attention(held, 1, scales, plain)
    assert relative(out.float(), plain.float()) < 0.05


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [300, 4608, 9217])
def test_values_with_a_mean(rows: int) -> None:
    """The tensor cores' accumulator cuts what it can't hold: over thousands of keys all in one direction."""
    qkv, scales = q_k_v(rows, 2, E4M3)
    mean = cast(2 + qkv[:, 4 * hopper.DIM :].float() / 50, E4M3)
    qkv = torch.cat([qkv[:, : 4 * hopper.DIM].float(), mean.float()], dim=1).to(E4M3)
    out, plain = (torch.empty(rows, 2 * hopper.DIM, device=DEVICE, dtype=E4M3) for _ in range(2))
    hopper.attention(qkv, hopper.transposed(qkv[:, 4 * hopper.DIM :]), 2, scales, out)
    plain_attention(qkv, 2, scales, plain)
    expected = exact(qkv, 2, scales)
    allowed = 1.2 * relative(plain.float() * SCALES[2], expected) + 2e-3
    assert relative(out.float() * SCALES[2], expected) <= allowed
