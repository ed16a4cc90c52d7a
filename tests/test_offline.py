"""The README's recipe for nodes without a network. Run: python -m pytest tests/test_offline.py

The Hub is a server of this machine that has one model; the nodes have no network at all.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, launcher_options, read_csv

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_NETWORK = ["unshare", "--net"] + ["--map-root-user"] * (os.getuid() != 0)


@pytest.fixture
def hub(tiny_model):
    """The address of a Hub that has the tiny model as owner/tiny."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            file = tiny_model / path.rpartition("/")[2]
            files = sorted(each for each in tiny_model.iterdir() if each.is_file())
            if path.startswith("/api/models/owner/tiny/tree/"):
                about = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
                body, name = json.dumps(about).encode(), "tree"
            elif path.startswith("/api/models/owner/tiny"):
                siblings = [{"rfilename": f.name} for f in files]
                about = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
                body, name = json.dumps(about).encode(), "about"
            elif path.startswith("/owner/tiny/resolve/") and file.is_file():
                body, name = file.read_bytes(), file.name
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Disposition", f'inline; filename="{name}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_a_login_node_fetched_trains_and_infers_without_a_network(hub, news, tmp_path):
    if subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    bin_dir, run_dir = Path(sys.executable).parent, tmp_path / "run"
    env = os.environ | {
        "HF_HOME": str(tmp_path / "cache"),
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
    }

    def call(*command, **more):
        result = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=env | {name: str(value) for name, value in more.items()},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    call("hf", "download", "owner/tiny", HF_ENDPOINT=hub, HF_HUB_OFFLINE=0)
    options = (*launcher_options(news), "--max_train_steps", 1)
    settings = {"MODEL": "owner/tiny", "TRAIN_FILE": news / "train.csv", "RUN_DIR": run_dir}
    settings |= {"SETUP": 0, "HF_HUB_OFFLINE": 1}
    launcher = ("bash", "run_train.sh", *options)
    call(*NO_NETWORK, *launcher, **settings)
    config = json.loads((run_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"  # not where it lies here
    infer = ("scripts/infer.py", "--run_dir", run_dir, "--input_file", news / "test.csv")
    infer += ("--output_file", tmp_path / "titles.csv", "--max_new_tokens", 4)
    call(*NO_NETWORK, sys.executable, *infer, HF_HUB_OFFLINE=1)
    assert len(read_csv(tmp_path / "titles.csv")) == 9
