"""What does not go together is refused in one sentence, and what goes together runs."""

from typing import Any

import pytest

from dfl_lora.compatibility import CHANGING, CLASHES, DRIFTING, OF_ONE_GRAPH, check_method
from dfl_lora.errors import UserError
from dfl_lora.preflight import preflight, talks_of
from dfl_lora.reading import resolve
from dfl_lora.recipe import Recipe

TOY = {
    "model": {"name_or_path": "toy"},
    "lora": {"r": 2, "target_modules": ["first"]},
    "task": {"kind": "toy"},
    "data": {"path": "builtin/toy"},
}
CHANGES = {"topology": "random_matching"}
MEETING: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer finite_time", "more than 10 peers"): {
        "method": {"mixer": "finite_time"}, "peers": {"num_peers": 11, "topology": "ring"},
    },
    ("mixer finite_time", "participation below 1"): {
        "method": {"mixer": "finite_time"}, "peers": {"participation": 0.5},
    },
    ("mixer gossip_pga", "fewer rounds than every"): {"method": {"mixer": "gossip_pga"}, "train": {"rounds": 5}},
    ("mixer exact", "participation below 1"): {"method": {"mixer": "exact"}, "peers": {"participation": 0.5}},
    ("mixer exact", "peers.mixing other than metropolis"): {"method": {"mixer": "exact"}, "peers": {"mixing": "lazy"}},
    ("mixer relay_sum", "peers.mixing other than metropolis"): {
        "method": {"mixer": "relay_sum"}, "peers": {"topology": "line", "mixing": "lazy"},
    },
    ("mixer relay_sum", "a graph that is no tree"): {"method": {"mixer": "relay_sum"}, "peers": {"topology": "ring"}},
    ("mixer relay_sum", "topology matrix"): {
        "method": {"mixer": "relay_sum"}, "peers": {"topology": "matrix(rows=[[0.5,0.5],[0.5,0.5]])", "num_peers": 2},
    },
    **{
        ("mixer relay_sum", other): {
            "peers": {"topology": "line"}, **case, "method": {"mixer": "relay_sum"} | case.get("method", {})
        }
        for other, case in {
            "a correction": {"method": {"correction": "led"}},
            "codecs with errors": {"method": {"codec": "bf16"}},
            "schedule alternating(mix=trained)": {"method": {"schedule": "alternating(mix=trained)"}},
            "train.order seed": {"train": {"order": "seed"}},
            "participation below 1": {"peers": {"topology": "star", "participation": 0.5}},
        }.items()
    },
    ("mixer closing", "participation below 1"): {"method": {"mixer": "closing"}, "peers": {"participation": 0.5}},
    ("mixer gossip_pga", "participation below 1"): {
        "method": {"mixer": "gossip_pga(every=2)"}, "peers": {"participation": 0.5},
    },
    ("correction k_gt(second_moments)", "optimizer sgd"): {
        "method": {"correction": "k_gt(second_moments=2)"}, "train": {"optimizer": "sgd"},
    },
    ("correction d2", "eigenvalues of -1/3 or less"): {
        "method": {"correction": "d2"}, "peers": {"topology": "edges(edges=[[0,1],[1,2],[2,3],[0,3]])", "num_peers": 4},
    },
    ("lora.ranks", "combine other than product"): {"lora": {**TOY["lora"], "ranks": [1, 2, 2, 2, 2, 2, 2]}},
    ("combine product, fair or rotated", "a correction"): {"method": {"combine": "fair", "correction": "led"}},
    ("combine product, fair or rotated", "mixers other than plain and exact"): {
        "method": {"combine": "product", "mixer": "chebyshev(k=2)"},
    },
    ("combine product, fair or rotated", "schedules that share one factor"): {
        "method": {"combine": "rotated", "schedule": "alternating(mix=trained)"},
    },
    ("schedule core", "lora.init kaiming"): {"method": {"schedule": "core"}},
    ("codec top_k or choco", "mixers of several exchanges"): {"method": {"codec": "top_k", "mixer": "chebyshev"}},
    ("codec top_k or choco", "correction k_gt"): {"method": {"codec": "choco", "correction": "k_gt"}},
    ("codec top_k or choco", "correction led or d2"): {"method": {"codec": "top_k", "correction": "led"}},
    ("codec top_k or choco", "combine product, fair or rotated"): {"method": {"codec": "choco", "combine": "fair"}},
    ("codec choco", "participation below 1"): {"method": {"codec": "choco"}, "peers": {"participation": 0.5}},
    ("codec choco", "schedule alternating(mix=trained)"): {
        "method": {"codec": "choco", "schedule": "alternating(mix=trained)"},
    },
    ("codec choco", CHANGING): {"method": {"codec": "choco"}, "peers": CHANGES},
    **{(f"mixer {name}", CHANGING): {"method": {"mixer": name}, "peers": CHANGES} for name in OF_ONE_GRAPH},
    **{(f"correction {name}", CHANGING): {"method": {"correction": name}, "peers": CHANGES} for name in DRIFTING},
    ("peers.mixing other than metropolis", "topology base"): {"peers": {"topology": "base", "mixing": "lazy"}},
    ("peers.mixing other than metropolis", "topology matrix"): {
        "peers": {"topology": "matrix(rows=[[0.5,0.5],[0.5,0.5]])", "num_peers": 2, "mixing": "lazy"},
    },
}  # fmt: skip
APART: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer finite_time", "more than 10 peers"): {"peers": {"num_peers": 10, "topology": "ring"}},
    ("mixer finite_time", "participation below 1"): {"peers": {"participation": 1.0}},
    ("mixer gossip_pga", "fewer rounds than every"): {"train": {"rounds": 6}},
    ("mixer exact", "participation below 1"): {"peers": {"participation": 1.0}},
    ("mixer exact", "peers.mixing other than metropolis"): {"method": {"mixer": "plain"}},
    ("mixer relay_sum", "peers.mixing other than metropolis"): {"peers": {"mixing": "metropolis"}},
    ("mixer relay_sum", "a graph that is no tree"): {"peers": {"topology": "star"}},
    ("mixer relay_sum", "topology matrix"): {"peers": {"topology": "line"}},
    ("mixer relay_sum", "a correction"): {"method": {"correction": "none"}},
    ("mixer relay_sum", "codecs with errors"): {"method": {"codec": "fp32"}},
    ("mixer relay_sum", "schedule alternating(mix=trained)"): {"method": {"schedule": "alternating(mix=both)"}},
    ("mixer relay_sum", "train.order seed"): {"train": {"order": "standard"}},
    ("mixer relay_sum", "participation below 1"): {"peers": {"participation": 1.0}},
    ("mixer closing", "participation below 1"): {"method": {"mixer": "plain"}},
    ("mixer gossip_pga", "participation below 1"): {"peers": {"participation": 1.0}},
    ("correction k_gt(second_moments)", "optimizer sgd"): {"train": {"optimizer": "adam"}},
    ("correction d2", "eigenvalues of -1/3 or less"): {"peers": {"topology": "ring", "num_peers": 4, "mixing": "lazy"}},
    ("lora.ranks", "combine other than product"): {"method": {"combine": "product"}},
    ("combine product, fair or rotated", "a correction"): {"method": {"correction": "none"}},
    ("combine product, fair or rotated", "mixers other than plain and exact"): {"method": {"mixer": "exact"}},
    ("combine product, fair or rotated", "schedules that share one factor"): {"method": {"schedule": "lora"}},
    ("schedule core", "lora.init kaiming"): {"lora": {**TOY["lora"], "init": "orthonormal"}},
    ("codec top_k or choco", "mixers of several exchanges"): {"method": {"mixer": "exact"}},
    ("codec top_k or choco", "correction k_gt"): {"method": {"correction": "quasi_global"}},
    ("codec top_k or choco", "correction led or d2"): {"method": {"codec": "int8"}},
    ("codec top_k or choco", "combine product, fair or rotated"): {"method": {"combine": "mean"}},
    ("codec choco", "participation below 1"): {"method": {"codec": "top_k"}},
    ("codec choco", "schedule alternating(mix=trained)"): {"method": {"schedule": "alternating(mix=both)"}},
    ("codec choco", CHANGING): {"method": {"codec": "top_k"}},
    **{(f"mixer {name}", CHANGING): {"method": {"mixer": "plain"}} for name in OF_ONE_GRAPH},
    **{(f"correction {name}", CHANGING): {"method": {"correction": "k_gt"}} for name in DRIFTING},
    ("peers.mixing other than metropolis", "topology base"): {"peers": {"mixing": "metropolis"}},
    ("peers.mixing other than metropolis", "topology matrix"): {"peers": {"mixing": "metropolis"}},
}
"""What is changed in each of those, so that they do go together."""


def recipe_of(case: dict[str, Any], more: dict[str, Any]) -> Recipe:
    parts = {part: {**case.get(part, {}), **more.get(part, {})} for part in {*case, *more}}
    return resolve({**TOY, "method": {"schedule": "lora"}, **parts})


def test_every_row_has_a_case() -> None:
    assert {(c.one, c.other) for c in CLASHES} == set(MEETING) == set(APART)


@pytest.mark.parametrize("pair", MEETING, ids=" with ".join)
def test_what_does_not_go_together_is_refused_and_its_neighbour_is_not(pair: tuple[str, str]) -> None:
    clash = next(c for c in CLASHES if (c.one, c.other) == pair)
    with pytest.raises(UserError) as told:
        preflight(recipe_of(MEETING[pair], {}))
    assert str(told.value) == f"{clash.one} does not go with {clash.other}: {clash.reason}."
    recipe = recipe_of(MEETING[pair], APART[pair])
    check_method(recipe, *talks_of(recipe))


def test_who_said_no_method_is_told_which_there_is() -> None:
    with pytest.raises(
        UserError, match=r"use mixer plain\. \(A recipe that says no method has k_gt, chebyshev\(k=2\), int8\.\)$"
    ):
        preflight(resolve({**TOY, "peers": {"topology": "random_matching"}}))
    preflight(resolve({**TOY, "train": {"optimizer": "sgd"}}))


def test_what_needs_every_message_is_refused_between_real_peers_alone() -> None:
    recipe = recipe_of({"method": {"codec": "choco"}}, {})
    preflight(recipe)
    with pytest.raises(UserError, match=r"codec choco does not go with real peers: .* use codec top_k\.$"):
        preflight(recipe, real=True)
    preflight(recipe_of({"method": {"codec": "top_k"}}, {}), real=True)


def test_a_start_that_needs_all_gradients_is_refused_between_real_peers() -> None:
    recipe = recipe_of({"lora": TOY["lora"] | {"init": "gradient_svd"}}, {})
    preflight(recipe)
    with pytest.raises(UserError, match=r"lora.init gradient_svd does not go with real peers: .* use init orthonormal"):
        preflight(recipe, real=True)


def test_d2_needs_a_polynomial_whose_values_are_above_minus_a_third() -> None:
    """Chebyshev's reach from minus its contraction: 0.18 on a ring of seven, 0.66 on one of sixteen."""
    for num_peers, fits in ((7, True), (16, False)):
        recipe = resolve(
            {
                **TOY,
                "method": {"correction": "d2", "mixer": "chebyshev(k=3)"},
                "peers": {"num_peers": num_peers, "topology": "ring"},
            }
        )
        if fits:
            check_method(recipe, *talks_of(recipe))
        else:
            with pytest.raises(UserError, match="it diverges"):
                check_method(recipe, *talks_of(recipe))
