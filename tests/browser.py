"""A real browser for the tests of the page: Chromium, spoken to over two pipes."""
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

QUIET = "document.getElementById('main').ariaBusy === 'false'"


def differ(found, expected):
    """The largest difference between lists of numbers and a tensor, over the largest number."""
    found, expected = torch.as_tensor(found).flatten(), expected.detach().flatten()
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Browser:
    """
    Chromium without a window and its DevTools protocol: JSON messages with a zero byte after each.
    It reads them from its file 3, and answers on its file 4.
    """

    def __init__(self, program, profile):
        # The ends are moved out of the way of 3 and 4
        to_it, ours = (fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in os.pipe())
        answers, from_it = (fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in os.pipe())

        def place_pipes():
            os.dup2(to_it, 3)
            os.dup2(from_it, 4)

        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             "about:blank"],
            preexec_fn=place_pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_it)
        os.close(from_it)
        self.write, self.read = open(ours, "wb", buffering=0), open(answers, "rb", buffering=0)
        self.unread, self.count, self.session, self.events = b"", 0, {}, []
        pages = self.call("Target.getTargets")["targetInfos"]
        page, = (target["targetId"] for target in pages if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command; return its result. What the browser tells meanwhile goes to events."""
        self.count += 1
        self.send(self.count, method, params)
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":
                # An open dialog would stop the page, and so the test that finds it
                self.send(0, "Page.handleJavaScriptDialog", {"accept": True})

    def send(self, number, method, params):
        message = {"id": number, "method": method, "params": params} | self.session
        self.write.write(json.dumps(message).encode() + b"\0")

    def receive(self):
        parts = [self.unread]
        while b"\0" not in parts[-1]:
            ready, _, _ = select.select([self.read], [], [], 30)
            assert ready, "the browser has not answered for 30 seconds"
            parts.append(self.read.read(65536))
            assert parts[-1], "the browser has ended"
        message, _, self.unread = b"".join(parts).partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """What a JavaScript expression gives in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition):
        began = time.perf_counter()
        while not self.value(condition):
            assert time.perf_counter() - began < 60, (
                condition, self.value("document.body.innerText")[:3000])
            time.sleep(0.02)

    def open(self, path):
        """Open the file, and wait until all panels are there or the page says why not."""
        self.check()
        self.call("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")
        self.until(f"document.getElementById('note').textContent || {QUIET}")

    def check(self):
        """Since the last call there was no dialog or error, and nothing but pages was loaded."""
        events, self.events = self.events, []
        for event in events:
            assert event.get("method") not in ("Page.javascriptDialogOpening", "Log.entryAdded",
                                           "Runtime.exceptionThrown"), event
            if event.get("method") == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                assert re.match(r"file:.*\.html$|blob:", url), url

    def press(self, key, text="", until=QUIET):
        """Press a key; one that writes something says what."""
        number = {"Tab": 9, "Enter": 13, "Backspace": 8, "Home": 36, "End": 35, "ArrowLeft": 37,
                  "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=number, text=text if kind == "keyDown" else "")
        self.until(until)

    def text(self, selector):
        found = json.dumps(selector)
        return self.value(f"[...document.querySelectorAll({found})].map(e => e.textContent)")

    def numbers(self, selector):
        return [float(text.replace("−", "-").rstrip(" %")) for text in self.text(selector)]

    def click(self, selector, until=QUIET):
        """Click in the middle of the first element that a selector finds, and wait."""
        found = json.dumps(selector)
        x, y = self.value(f"(() => {{ const e = document.querySelector({found});"
                          f" e.scrollIntoView({{ block: 'center' }});"
                          f" const b = e.getClientRects()[0];"
                          f" return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.until(until)

    def copy(self):
        return "\n".join(self.text(".reading .paint > div")).removesuffix("\u2009")

    def choose(self, name, value):
        """Give a select, a slider or a field a value, as a user would."""
        for kind in ("input", "change"):
            self.value(f"$('{name}').value = {json.dumps(value)};"
                       f"$('{name}').dispatchEvent(new Event('{kind}', {{ bubbles: true }}));")
        self.until(QUIET)

    @contextmanager
    def another_tab(self):
        # In front of ours, to which commands still go
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.call("Target.activateTarget", targetId=tab)
        yield
        self.call("Target.closeTarget", targetId=tab)

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        self.write.close()
        self.read.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
