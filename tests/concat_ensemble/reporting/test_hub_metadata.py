"""The card's metadata as the Hub validates them: the real client, with a local server that applies the Hub's rules."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from concat_ensemble.reporting.licenses import REQUIREMENTS

CARDS = sorted((Path(__file__).parents[3] / "model_cards").glob("*/README.md"))
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
VALIDATE = (
    "import sys; from huggingface_hub import ModelCard\nfor path in sys.argv[1:]: ModelCard.load(path).validate()"
)


def faults(content: str) -> list[str]:
    """Violations of the rules in hub-docs' modelcard.md, in the words of the Hub's server."""
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)[1])
    errors = []

    def must(holds, field):
        if not holds:
            errors.append(f'"{field}" is invalid')

    must(data.get("license") in {*REQUIREMENTS, "other"}, "license")
    if data.get("license") == "other":
        must(re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "")), "license_name")
        must(re.fullmatch(r"LICENSE(\.md)?|https?://\S+", data.get("license_link", "")), "license_link")
    must(data.get("pipeline_tag") in ("image-classification", "image-feature-extraction"), "pipeline_tag")
    must(isinstance(data.get("library_name"), str), "library_name")
    must(
        data.get("base_model_relation", "merge") in ("adapter", "merge", "quantized", "finetune"),
        "base_model_relation",
    )
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        must(all(REPO_ID.fullmatch(name) for name in ([names] if isinstance(names, str) else names)), key)
    for key in ("tags", "metrics"):
        must(all(isinstance(word, str) for word in data.get(key, [])), key)
    for n, model in enumerate(data.get("model-index", [])):
        must(isinstance(model["name"], str), f"model-index[{n}].name")
        for k, result in enumerate(model["results"]):
            at = f"model-index[{n}].results[{k}]"
            dataset = result["dataset"]
            must(isinstance(result["task"]["type"], str), f"{at}.task.type")
            must(isinstance(dataset["type"], str) and isinstance(dataset["name"], str), f"{at}.dataset")
            must(
                all(isinstance(dataset.get(key, ""), str) for key in ("config", "split", "revision")),
                f"{at}.dataset.config",
            )
            must(
                all(isinstance(metric["type"], str) and "value" in metric for metric in result["metrics"]),
                f"{at}.metrics",
            )
    return errors


@pytest.fixture
def hub():
    class Rules(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_model = (self.path, request["repoType"]) == ("/api/validate-yaml", "model")
            errors = faults(request["content"]) if is_model else ["not a request for a model card"]
            answer = "\n".join(errors).encode()
            self.send_response(400 if errors else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Rules)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def validate(hub, *paths):
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", VALIDATE, *map(str, paths)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_hub_accepts_the_cards(hub, tmp_path):
    assert len(CARDS) >= 2
    process = validate(hub, *CARDS)
    assert process.returncode == 0, process.stderr
    broken = tmp_path / "README.md"
    broken.write_text(CARDS[0].read_text().replace("license: apache-2.0", "license: whatever"))
    assert '"license" is invalid' in validate(hub, broken).stderr, "the rules are applied"
