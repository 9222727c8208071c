"""sources.py: files, folders and globs, and downloads from servers of our own."""
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import PLAY, contents, error_of, prepare, python, refused

from nanodva import sources
from nanodva.dataset import read_meta
from nanodva.sources import find
from prepare_data import PrepareConfig, main

# ---- files ---------------------------------------------------------------------------------------

def test_files_folders_globs_and_names_with_special_characters(tmp_path, capsys):
    folder = tmp_path / "sp ace"
    (folder / "deep").mkdir(parents=True)
    for name in ("x[1].txt", "a,b.txt", "deep/c.txt", "image.png"):
        (folder / name).write_text(name * 9)
    texts = ["a,b.txt", "deep/c.txt", "x[1].txt"]
    # A glob may take files that a folder does not offer, but takes no file twice
    for value, names in [(folder, texts), (f"{tmp_path}/**", [*texts, "image.png"]),
                         (f"{folder}/x[1].txt,{folder}/a*", ["x[1].txt", "a,b.txt"]),
                         (f"{folder}/a,b.txt", ["a,b.txt"])]:
        found = find("input", PrepareConfig("mine", str(value)))
        assert found == [str(folder / name) for name in names]
        assert ("skipped" in capsys.readouterr().out) == (value == folder)
    for name in texts:
        (folder / name).unlink()
    (folder / "chat.csv").write_text("who,said\na,b\n")
    with refused("1 .png", "1 .csv without a column 'text'", "--column", "FOLDER/**/*.py"):
        find("input", PrepareConfig("mine", str(folder)))


def test_only_what_is_meant_is_read_from_a_folder(tmp_path, capsys):
    folder = tmp_path / "corpus"
    texts = {"b.txt": "text b\n" * 20, "deep/A.TXT": "text a\n" * 20, "c.csv": "text\nrow\n",
             "d.jsonl": '{"text": "line"}\n', "README.md": "# Title\n", "e.Markdown": "*e*\n"}
    others = {".DS_Store": "\0", "._b.txt": "\0", ".git/a.txt": "no", ".venv/lib/a.txt": "no",
              "__MACOSX/b.txt": "no", "node_modules/x/readme.txt": "no", "b.txt~": "no",
              ".~lock.b.txt#": "no", "book.pdf": "%PDF-", "book2.PDF": "%PDF-", "clean.py": "no",
              "LICENSE": "no", "dataset_info.json": '{"features": {}}', "broken.json": "{",
              "catalogue.csv": "title,year\nb,1900\n"}
    for name, text in (texts | others).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "loop").symlink_to(folder)
    found = find("input", PrepareConfig("mine", str(folder)))
    assert found == sorted(str(folder / name) for name in texts)
    reading, skipped = capsys.readouterr().out.splitlines()
    assert reading == "reading 2 .txt, 1 .md, 1 .csv, 1 .jsonl, 1 .markdown"
    # How many of each, and how to read them
    for label in ("8 hidden", "2 .pdf", "1 .py", "1 without a suffix", "pdftotext", "--column",
                  "2 .json without a column 'text'", "1 .csv without a column 'text'", "/**/*.py"):
        assert label in skipped


# ---- downloads -----------------------------------------------------------------------------------

def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE", (tmp_path / "none").as_uri())
    # conftest.py has set HF_HUB_OFFLINE
    for words, *arguments in [("huggingface.co", "openwebtext", "--max_tokens=1000"),
                              ("huggingface.co", "mine", "--input=hf:nobody/nothing@1"),
                              ("python prepare_data.py plays_char", "shakespeare_char")]:
        message = error_of(*arguments, f"--data_dir={tmp_path / 'data'}")
        assert words in message and "--input=PATH" in message
    assert not (tmp_path / "data").exists()


def test_a_name_on_the_hub_is_never_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/set").mkdir(parents=True)
    for name in ("hf:", "hf:@main", "hf:/", "hf:a/b/c", "hf:../a", "hf:user/", "hf:a b"):
        assert f"{name}: " in error_of("mine", f"--input={name}")
    for name in ("hf:some/set", "hf:some/set@main"):
        assert "some/set is also the name of something in this folder: give that with " \
            "--input=some/set" in error_of("mine", f"--input={name}")


def test_tiny_shakespeare_is_downloaded_once(tmp_path, monkeypatch):
    copy = tmp_path / "copy.txt"
    shutil.copyfile(PLAY, copy)
    monkeypatch.setattr(sources, "SHAKESPEARE", copy.as_uri())
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", sources.sha256(PLAY))
    folder = prepare(tmp_path, "shakespeare_char")
    assert (folder / "input.txt").read_bytes() == PLAY.read_bytes()
    copy.write_text("something else")
    (folder / "train.bin").unlink()
    main(["shakespeare_char", f"--data_dir={tmp_path}"])
    assert read_meta(folder, deep=True)["tokens"]["train"] == 170_532
    (folder / "input.txt").unlink()
    assert "sha256" in error_of("shakespeare_char", f"--data_dir={tmp_path}")


class Hub(BaseHTTPRequestHandler):
    """What the Hugging Face hub answers about the data set some/set in `folder`."""
    protocol_version, commit, folder, downloads = "HTTP/1.1", "c" * 40, None, []

    def do_GET(self):
        path = self.path.partition("?")[0]
        file, body, headers = self.folder / path.rpartition("/")[2], b"", {}
        if "/some/set" not in path:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif "/tree/" in path:
            # The set has no folders in it
            files = self.folder.iterdir() if path.endswith(self.commit) else []
            body = json.dumps([{"type": "file", "path": found.name, "oid": found.name,
                                "size": found.stat().st_size} for found in files]).encode()
        elif path.startswith("/api/datasets/"):
            body = json.dumps({"id": "some/set", "sha": self.commit}).encode()
        elif file.is_file():
            body, headers = file.read_bytes(), {"ETag": f'"{file.name}"'}
            self.downloads += [file.name] if self.command == "GET" else []
        else:
            headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        headers |= {"X-Repo-Commit": self.commit, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


CONFIGURATIONS = """---
configs:
- config_name: all
  data_files: "*.parquet"
- config_name: late
  data_files: [{split: train, path: 01.parquet}]
---
"""
# Each data set is prepared in a folder of its own, and how that ended is printed, as JSON
PREPARE_EACH = """if True:
    import json, sys, prepare_data
    from nanodva.errors import UserError
    ends = []
    for number, source in enumerate(sys.argv[2:]):
        try:
            prepare_data.main(["mine", f"--input={source}", f"--data_dir={sys.argv[1]}/{number}"])
            ends.append("done")
        except UserError as error:
            ends.append(str(error))
    print(json.dumps(ends))"""


def test_a_hub_data_set_is_read_through_the_cache_and_its_configuration_named(tmp_path, speeches):
    """All in one process, since the package datasets takes a second to import."""
    Hub.folder = tmp_path / "hub"
    shutil.copytree(speeches[0] / "parquet", Hub.folder)
    (Hub.folder / "README.md").write_text(CONFIGURATIONS)
    names = ["hf:some/set:all", "hf:some/set:all@main", "hf:some/set:late", "hf:some/set",
             "hf:some/set:middle", "hf:nobody/nothing"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = python(PREPARE_EACH, tmp_path, *names, HF_HUB_OFFLINE="0",
                        HF_HOME=str(tmp_path / "cache"),
                        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    ends = json.loads(result.stdout.splitlines()[-1])
    assert ends[:3] == ["done"] * 3
    found = contents(tmp_path / "0" / "mine")
    assert found == contents(tmp_path / "1" / "mine")
    local = prepare(tmp_path / "local", "mine", f"--input={speeches[0] / 'parquet'}")
    assert found["train.bin"] == (local / "train.bin").read_bytes()
    # The second time both files were in the cache
    assert sorted(name for name in Hub.downloads if name != "README.md") == \
        ["00.parquet", "01.parquet"]
    shards = [f"hf://datasets/some/set@{Hub.commit}/{number}.parquet" for number in ("00", "01")]
    files = [read_meta(tmp_path / number / "mine")["source"]["files"] for number in ("0", "2")]
    assert files == [shards, shards[1:]]

    # No configuration is named, or none of its own; no such set
    for name, message in zip(names[3:], ends[3:], strict=True):
        assert message.startswith(f"{name}: ") and "hf:REPO:CONFIGURATION" in message
    for message in ends[3:5]:
        assert "all" in message and "late" in message
