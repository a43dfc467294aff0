"""A peer that runs reads its own roster file again when somebody was admitted there."""

from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dfl_lora.graphs import Graph
from dfl_lora.hosting import looking
from dfl_lora.membership.identity import new_identity
from dfl_lora.membership.roster import Member, first_roster, write_roster
from dfl_lora.networks.contract import Contract, Limits
from dfl_lora.networks.real import PeerNetwork


def test_who_is_admitted_while_a_peer_runs_is_known_to_it_without_a_restart(tmp_path: Path) -> None:
    own, newcomer, organiser = new_identity(), new_identity(), Ed25519PrivateKey.generate()
    roster = first_roster(organiser, "", 2, [Member.of(own, [0], ["127.0.0.1:9"])])
    path, events = tmp_path / "roster.json", list[str]()
    write_roster(path, roster)
    network = PeerNetwork(
        own, roster, [0], Graph.of(2, [(0, 1)]), Contract("", "", "", ""), Limits(),
        listen=None, insecure=False, observe=lambda event: events.append(event["why"]),
    )  # fmt: skip
    with network:
        look = looking(network, path)
        assert look()["epoch"] == 1 and events == []
        later = roster.admitting(Member.of(newcomer, [1], [])).sealed_by(organiser)
        forged = replace(later, epoch=3).to_json()
        path.write_bytes(forged)
        assert look()["epoch"] == 1 and events == []
        write_roster(path, later)
        assert look()["epoch"] == 2 and events == ["epoch 2 with 2 members"]
        assert [member["peers"] for member in look()["members"]] == [[1]]
