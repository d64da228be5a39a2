"""A chromium under the DevTools protocol, over its pipe: no package is needed but the browser itself."""

import base64
import json
import os
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

CHROMIUM = os.environ.get("IPVRM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KEY_CODES = {"Escape": 27}
DEADLINE = 120.0  # seconds for one answer; a machine may be busy


class Chromium:
    """A headless browser; use it as a context."""

    def __init__(self, folder: Path):
        inward, self.out = os.pipe()
        self.inp, outward = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--disable-extensions", "--disable-dev-shm-usage", "--disable-background-networking"]
        flags += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        shell = f'exec "$@" 3<&{inward} 4>&{outward}'  # the protocol's descriptors are 3 and 4
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", CHROMIUM, *flags],
            pass_fds=(inward, outward),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self.numbers, self.rest, self.events = count(1), b"", []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.inp)
        os.close(self.out)

    def send(self, method, session=None, **params):
        """The answer to a command; what else arrives meanwhile is kept in `events`."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return self.until(lambda m: m.get("id") == number, method)

    def until(self, wanted, what):
        """The first message from now on that is `wanted`."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            while b"\0" not in self.rest:
                if not (part := os.read(self.inp, 1 << 16)):
                    raise RuntimeError(f"chromium has ended before it answered {what}")
                self.rest += part
            text, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(text)
            if "id" not in message:
                self.events.append(message)
            if wanted(message):
                if "error" in message:
                    raise RuntimeError(f"{what}: {message['error']}")
                return message.get("result", message)
        raise TimeoutError(f"{what}: no answer in {DEADLINE} s")

    def open(self, url, width=1280, height=900, dark=False, touch=False):
        """A tab of that size, when the page has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", session, features=[scheme])
        if touch:
            self.send("Emulation.setTouchEmulationEnabled", session, enabled=True)
        tab = Tab(self, target, session)
        self.events.clear()
        self.send("Page.navigate", session, url=url)
        if not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.until(lambda m: m.get("method") == "Page.loadEventFired", url)
        return tab


class Tab:
    """One page. `heard` is what it should not have done: console messages, errors, dialogs, requests."""

    def __init__(self, browser, target, session):
        self.browser, self.target, self.session = browser, target, session

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def __call__(self, code):
        """The value of an expression."""
        found = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{code}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self, selector):
        return self(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector):
        """How many match and are shown."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self(f"{found}.filter(e => e.checkVisibility()).length")

    def press(self, key, modifiers=0):
        more = {"windowsVirtualKeyCode": KEY_CODES[key]} if key in KEY_CODES else {}
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **more)

    def place(self, element):
        """The middle of the element that an expression gives, scrolled into view."""
        code = "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        return self(code + f" return [b.left + b.width / 2, b.top + b.height / 2]; }})({element})")

    def click(self, x, y):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, x, y):
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def heard(self):
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event["method"], event["params"]
            if method == "Network.requestWillBeSent":
                if not params["request"]["url"].startswith(("file:", "data:")):
                    found.append(params["request"]["url"])
            elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params)[:500])
            elif method == "Page.javascriptDialogOpening":
                found.append("a dialog")
        return found

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)


def contrast(a, b):
    """WCAG 2: of two colours like #ffffff."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
