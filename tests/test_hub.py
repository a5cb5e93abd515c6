"""Optimizer networks to and from the Hub, and every way in which that can fail.

The real huggingface_hub client runs in processes of its own (`hub_client`), against `hub_server`.
"""

import socket

import pytest
from hub_client import Client, HubError
from test_weights import network

from learned_optim import load_network
from learned_optim.weights import fingerprint


@pytest.fixture(scope="module")
def clients(hub, online):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    others = {"offline": Client(online.home, hub.url, HF_HUB_OFFLINE="1"), "dead": Client(online.home, dead, "no-wait")}
    yield {"online": online, **others}
    for client in others.values():
        client.close()


def push(client, repo, seed, **options):
    return client(f"network({seed}).push_to_hub({repo!r}, **{options!r})")


def test_push_and_load(hub, online):
    commit = push(online, "user/first", 1)
    repository = hub.repositories["user/first"]
    assert repository.refs["main"] == commit
    assert len(repository.commits) == 2, "one commit for all files, after the one that makes the repository"
    files = repository.commits[commit]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: learned-optim\n")
    assert 'LearnedOptimizer(model.parameters(), "user/first")' in card
    assert online("load('user/first')") == fingerprint(network(1))
    assert online("fingerprint(OptimizerNetwork.from_pretrained('user/first', 'main'))") == fingerprint(network(1))


def test_a_new_repository_takes_the_users_name_visibility_and_token(hub, online):
    start = len(hub.requests)
    push(online, "mine", 1, private=True, token="hf_secret")
    assert hub.repositories["user/mine"].private is True
    assert b'"user/mine"' in hub.repositories["user/mine"].commits[hub.repositories["user/mine"].refs["main"]]["README.md"]
    assert {token for _, path, token in hub.requests[start:] if not path.startswith("/lfs/")} == {"Bearer hf_secret"}


def test_pushing_again(hub, online):
    first = push(online, "user/again", 1)
    repository = hub.repositories["user/again"]
    card = repository.commit({"README.md": b"my own card"})
    assert push(online, "user/again", 1) == card, "nothing changed, so there is no commit"
    second = push(online, "user/again", 2)
    assert second not in (first, card)
    assert repository.commits[second]["README.md"] == b"my own card"
    assert online("load('user/again')") == fingerprint(network(2))


def test_pinned_revisions(hub, online):
    first = push(online, "user/pinned", 1)
    hub.repositories["user/pinned"].refs["v1"] = first
    second = push(online, "user/pinned", 2)
    assert online("load('user/pinned')") == fingerprint(network(2))
    for revision in (first, "v1"):
        assert online(f"load('user/pinned', revision={revision!r})") == fingerprint(network(1))
    optimizer = f"LearnedOptimizer([torch.nn.Parameter(torch.ones(2))], 'user/pinned', revision={first!r})"
    assert online(f"{optimizer}.param_groups[0]['weights']") == fingerprint(network(1))
    start = len(hub.requests)
    online(f"load('user/pinned', revision={second!r})")
    assert hub.requests[start:] == [], "a cached commit needs no request"


def test_config_and_weights_come_from_one_commit(hub, online):
    commit = push(online, "user/moving", 1)
    start = len(hub.requests)
    online("load('user/moving')")
    asked = {path for _, path, _ in hub.requests[start:]}
    assert asked == {"/user/moving/resolve/main/config.json", f"/user/moving/resolve/{commit}/model.safetensors"}


def test_the_cache_serves_without_the_hub(hub, clients):
    first = push(clients["online"], "user/cached", 1)
    hub.repositories["user/cached"].refs["v1"] = first
    clients["online"]("load('user/cached')")
    clients["online"]("load('user/cached', revision='v1')")
    start = len(hub.requests)
    for client in ("offline", "dead"):
        for revision in (None, "v1", first):
            assert clients[client](f"load('user/cached', revision={revision!r})") == fingerprint(network(1))
    assert hub.requests[start:] == []


def test_a_cached_config_never_pairs_with_the_weights_of_another_commit(hub, clients):
    push(clients["online"], "user/half", 1)
    clients["online"]("load('user/half')")
    hub.repositories["user/half"].commit({"config.json": b'{"format_version": 1, "momentum": 0.1}'})
    del hub.repositories["user/half"].commits[hub.repositories["user/half"].refs["main"]]["model.safetensors"]
    with pytest.raises(HubError, match=r"FileNotFoundError: model\.safetensors of Hub repository 'user/half' at 'main' does not exist"):
        clients["online"]("load('user/half')")
    with pytest.raises(HubError, match=r"FileNotFoundError: model\.safetensors of Hub repository 'user/half' at 'main' is not cached"):
        clients["offline"]("load('user/half')")


@pytest.mark.parametrize(
    ("client", "source", "revision", "message", "cause"),
    [
        ("online", "user/nope", None, "FileNotFoundError: 'user/nope' is no bundled set .*Check the spelling.*hf auth login", "Repos"),
        ("online", "user/errors", "v9", r"FileNotFoundError: config\.json of .*'user/errors' at 'v9' .*no such branch, tag or", "Revision"),
        ("online", "user/errors", "0" * 40, "FileNotFoundError: .*'user/errors' at '0{40}' .*no such branch, tag or commit", "Revision"),
        ("online", "user/gated", None, "PermissionError: .*'user/gated' .*is gated: ask for access .*hf auth login", "GatedRepo"),
        ("online", "user/empty", None, r"FileNotFoundError: config\.json of .*'user/empty' at 'main' does not exist; push", "RemoteEntry"),
        ("online", "user/newer", None, r"ValueError: .*config\.json has format_version 99; .*Install a newer", "NoneType"),
        ("online", "user/na--me", None, "FileNotFoundError: 'user/na--me' is no bundled set", "NoneType"),
        ("offline", "user/nope", None, r"FileNotFoundError: config\.json .*'user/nope' .*not cached, .*offline.*default", "LocalEntry"),
        ("offline", "user/errors", "v8", r"FileNotFoundError: config\.json .*'user/errors' at 'v8' is not cached", "LocalEntry"),
        ("dead", "user/nope", None, "FileNotFoundError: .*'user/nope' .*not cached, and the Hub was not reached: .*refused", "LocalEntry"),
    ],
)
def test_errors_of_the_hub(hub, clients, client, source, revision, message, cause):
    if "user/errors" not in hub.repositories:
        push(clients["online"], "user/errors", 1)
        for name in ("gated", "empty", "newer"):
            clients["online"](f"__import__('huggingface_hub').create_repo('user/{name}', exist_ok=True).repo_id")
        files = dict(hub.repositories["user/errors"].commits[hub.repositories["user/errors"].refs["main"]])
        hub.repositories["user/newer"].commit({**files, "config.json": b'{"format_version": 99}'})
    with pytest.raises(HubError, match="^" + message) as caught:
        clients[client](f"load({source!r}, revision={revision!r})")
    assert caught.value.cause.startswith(cause)


def test_pushing_refuses_nan_before_it_makes_a_repository(hub, online):
    with pytest.raises(HubError, match="ValueError: the network has NaN or infinite weights"):
        online("broken().push_to_hub('user/broken')")
    assert "user/broken" not in hub.repositories


def test_bundled_sets_need_neither_the_hub_nor_its_client(clients):
    for client in (clients["offline"], clients["dead"]):
        assert client("load('default')") == fingerprint(load_network("default"))
