"""A push, against a hub of this machine that speaks as much of the protocol as huggingface_hub asks for."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi

from sft_dist.errors import ConfigError, DataError
from sft_dist.hub import Hub

TOKEN = "hf_of_the_test"


class FakeHub(ThreadingHTTPServer):
    """Users by token, repositories by name with their files, and what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.users = {TOKEN: {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}}
        self.repos, self.asked, self.broken = {}, [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def hub(self, repo="me/model", token=TOKEN, **more):
        return Hub(repo, api=HfApi(endpoint=f"http://127.0.0.1:{self.server_port}", token=token), **more)


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, value):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        user = hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            return self.answer(200, user)
        repo = "/".join(path.split("/")[3:5])
        if repo not in hub.repos:
            return self.answer(404, {"error": "Repository not found"})
        about, files = hub.repos[repo]
        if "/tree/" in path:
            return self.answer(200, [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in files])
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": repo, "_id": "0", "private": about["private"], "sha": "0" * 40, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def do_POST(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path in hub.broken:
            return self.answer(500, {"error": "no room"})
        if path == "/api/repos/create":
            given = json.loads(content)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            if repo in hub.repos:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"http://127.0.0.1/{repo}"}
                )
            hub.repos[repo] = ({"private": bool(given.get("private") or given.get("visibility") == "private")}, {})
            return self.answer(200, {"url": f"http://127.0.0.1/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return self.answer(200, {"files": files})
        repo = "/".join(path.split("/")[3:5])
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                hub.repos[repo][1][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del hub.repos[repo][1][line["value"]["path"]]
        return self.answer(
            200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"http://127.0.0.1/{repo}/commit/1"}
        )


@pytest.fixture
def fake(monkeypatch):
    server = FakeHub()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def test_what_is_pushed_is_the_folder_and_old_weights_go(fake, folder):
    hub = fake.hub(is_private=True)
    hub.require_access()
    about, files = fake.repos["me/model"]
    assert about == {"private": True}
    files |= {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"", "notes.md": b"mine"}
    assert hub.push(folder, 6).endswith("me/model/commit/1")
    assert files == {p.name: p.read_bytes() for p in folder.iterdir()} | {"notes.md": b"mine"}
    fake.hub("org/model").require_access()
    assert fake.repos["org/model"][0] == {"private": False}


def test_who_may_not_push_is_told_before_anything_is_made(fake, monkeypatch):
    fake.users["hf_reads"] = {**fake.users[TOKEN], "auth": {"accessToken": {"role": "read"}}}
    for hub, words in (
        (fake.hub("other/model"), "me is not in other; push to one of me, org"),
        (fake.hub(token="hf_reads"), "the token of me may only read; log in with one that may write"),
        (
            fake.hub(token="hf_wrong"),
            "--push-to me/model: the hub says 401 .*; log in with a token that may write there",
        ),
        (fake.hub("me/a--b"), "--push-to me/a--b: .*; mend the name"),
    ):
        with pytest.raises(ConfigError, match=words) as told:
            hub.require_access()
        assert "hf_" not in str(told.value), "no token in a message"
    assert fake.repos == {}
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(ConfigError, match="log in with `hf auth login`, or set HF_TOKEN"):
        fake.hub(token=None).require_access()


def test_a_public_repository_does_not_become_private_by_itself(fake):
    fake.hub().require_access()
    with pytest.raises(ConfigError, match="is there already, and public; make it private on the hub first"):
        fake.hub(is_private=True).require_access()


def test_a_hub_that_is_away_or_breaks_is_told_and_the_export_stays(fake, folder, monkeypatch):
    hub = fake.hub()
    hub.require_access()
    fake.broken.add("/api/models/me/model/preupload/main")
    with pytest.raises(
        DataError, match=f"the hub says 500 .* The export is whole in {folder}: `hf upload me/model {folder}`"
    ):
        hub.push(folder, 6)
    away = Hub("me/model", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    with pytest.raises(DataError, match=r"the hub is out of reach .*; try again with a network"):
        away.require_access()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it, or export without --push-to"):
        hub.require_access()


@pytest.mark.parametrize("name", ["me", "a/b/c", "/x", ""])
def test_a_name_that_is_none_is_told(name):
    with pytest.raises(ConfigError, match="not of the form ORG/NAME; write for example my-org/my-model"):
        Hub(name)
