"""One owner of memory, and views of it."""

import pytest
import torch

from dfl_lora.peers import STEPS, Peers
from dfl_lora.tensors import Layout, Tensors

START = Tensors(torch.arange(10.0), Layout.of({"q.B": ("B", (3, 2)), "head": ("head", (4,))}))
COMMON = Tensors(torch.full((4,), 9.0), Layout.of({"q.A": ("A", (2, 2))}))


@pytest.fixture
def peers() -> Peers:
    peers = Peers([2, 5, 6], START, COMMON, optimizer=["exp_avg", "exp_avg_sq"], memory=["gradient_shift"])
    peers.x += torch.tensor([[0.0], [10.0], [50.0]])
    return peers


def test_all_start_at_the_same_adapter_with_empty_memories() -> None:
    peers = Peers(range(3), START, COMMON, optimizer=["exp_avg"], memory=["c"])
    assert torch.equal(peers.x, START.flat.expand(3, -1))
    for matrix in (peers.optimizer["exp_avg"], peers.memory["c"]):
        assert matrix.shape == (3, 10)
        assert not matrix.any()
    assert peers.counters.shape == (3, STEPS + 1)
    assert peers.counters.dtype == torch.int64
    assert not peers.counters.any()


def test_replicas_begin_where_all_peers_start() -> None:
    peers = Peers(range(3), START, COMMON, memory=["start", "replica", "gap"])
    assert torch.equal(peers.memory["replica"], START.flat.expand(3, -1))
    assert torch.equal(peers.memory["start"], START.flat.expand(3, -1))
    assert not peers.memory["gap"].any()


def test_the_start_is_copied() -> None:
    peers = Peers([0], START, COMMON)
    peers.x.zero_()
    assert START.flat.any()


def test_peers_are_a_sequence_in_the_order_of_ids(peers: Peers) -> None:
    assert len(peers) == 3
    assert [p.id for p in peers] == [2, 5, 6]
    assert peers[-1].id == 6
    assert [p.id for p in peers[1:]] == [5, 6]
    assert [p.id for p in peers[::-1]] == [6, 5, 2]
    assert peers[3:] == []
    with pytest.raises(IndexError):
        peers[3]


def test_a_peer_is_views_of_its_row_and_of_no_other(peers: Peers) -> None:
    peer = peers[1]
    peer.adapter["head"].fill_(-1.0)
    peer.optimizer["exp_avg_sq"].flat.fill_(2.0)
    peer.memory["gradient_shift"]["q.B"].fill_(3.0)
    peer.counters[STEPS] = 7
    assert peers.x[:, 6:].tolist() == [[6, 7, 8, 9], [-1] * 4, [56, 57, 58, 59]]
    assert peers.optimizer["exp_avg_sq"].sum(1).tolist() == [0, 20, 0]
    assert peers.optimizer["exp_avg"].sum() == 0
    assert peers.memory["gradient_shift"].sum(1).tolist() == [0, 18, 0]
    assert peers.counters[:, STEPS].tolist() == [0, 7, 0]


def test_what_is_not_declared_is_absent() -> None:
    peer = Peers([0], START, COMMON)[0]
    assert peer.optimizer == {}
    assert peer.memory == {}


def test_stacked_tensors_are_views_with_a_row_for_each_peer(peers: Peers) -> None:
    b = peers.stacked("q.B")
    assert b.shape == (3, 3, 2)
    assert torch.equal(b[2], peers[2].adapter["q.B"])
    b[2, 0, 1] = -5.0
    assert peers.x[2, 1] == -5.0


def test_a_common_tensor_is_stacked_once(peers: Peers) -> None:
    a = peers.stacked("q.A")
    assert a.shape == (1, 2, 2)
    assert a.data_ptr() == COMMON.flat.data_ptr()


def test_the_adapter_of_a_row_has_every_tensor(peers: Peers) -> None:
    adapter = peers.adapter(1)
    assert adapter.keys() == {"q.A", "q.B", "head"}
    assert torch.equal(adapter["q.A"], COMMON["q.A"])
    assert adapter["head"].tolist() == [16, 17, 18, 19]


def test_the_adapter_of_the_consensus_is_the_mean_over_peers(peers: Peers) -> None:
    adapter = peers.adapter(None)
    assert adapter["head"].tolist() == [26, 27, 28, 29]
    assert torch.equal(adapter["q.A"], COMMON["q.A"])


def test_the_consensus_is_one_peer_at_the_mean(peers: Peers) -> None:
    consensus = peers.consensus()
    assert [p.id for p in consensus] == [-1]
    assert torch.equal(consensus.x[0], START.flat + 20)
    assert consensus.common is COMMON
    consensus.x.zero_()
    assert peers.x.any()


def test_the_mean_is_taken_in_float64() -> None:
    peers = Peers(range(3), Tensors(torch.zeros(10), START.layout), COMMON)
    peers.x[:, 0] = torch.tensor([1e8, 1.0, -1e8])
    assert peers.consensus().x[0, 0] == torch.tensor(1 / 3)
    assert peers.adapter(None)["q.B"][0, 0] == torch.tensor(1 / 3)
    assert peers.consensus().x.dtype == torch.float32


def test_arrays_are_the_matrices_themselves(peers: Peers) -> None:
    arrays = peers.arrays()
    assert list(arrays) == [
        "x", "counters", "optimizer.exp_avg", "optimizer.exp_avg_sq", "memory.gradient_shift",
    ]  # fmt: skip
    assert arrays["x"] is peers.x
    assert arrays["counters"] is peers.counters
    assert arrays["memory.gradient_shift"] is peers.memory["gradient_shift"]
