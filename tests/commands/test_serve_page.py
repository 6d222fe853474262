"""The page at `/`, in a real browser against a real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import chromium
from helpers.serving import KEY, Server
from helpers.typed import DEMO

N_CTX = 2048
QUESTION = "How many apples are left?"
HTML = '<script>document.title = "hit"</script><img src=x onerror="document.title=\'hit\'"><b>&amp;</b>'
SOURCES = ("text", "recycling", "heads", "model")


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    """One tree for every step, so that who guessed what is the same each time."""
    with Server(
        "--model", DEMO, "--heads", models["hydra"], "--draft", "static", "--trees", "generic-hydra:n8", "--ctx", N_CTX,
        "--threads", 1, "--model-alias", "demo", key=None,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def shared(models: dict[str, Path]) -> Iterator[Server]:
    with Server("--model", DEMO, "--ctx", N_CTX, "--threads", 1, "--parallel", 2, key=KEY) as server:
        yield server


# -- over HTTP --


def test_page_is_served_with_its_headers(server: Server) -> None:
    with server.http() as http:
        page = http.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        found = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
        assert sorted(found) == ["page/script.js", "page/style.css"]
        answers = {"": page, **{name: http.get(f"/{name}") for name in found}}
        kinds = {
            "page/script.js": "text/javascript; charset=utf-8",
            "page/style.css": "text/css; charset=utf-8",
        }
        for name, answer in answers.items():
            assert answer.headers["content-type"] == kinds.get(name, "text/html; charset=utf-8")
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = dict(
                part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert "unsafe" not in str(policy)
            outside = set(re.findall(r"https?://[^\s\"']+", answer.text)) - {"http://www.w3.org/2000/svg"}
            assert not outside, name
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert sink not in answers["page/script.js"].text
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page.text)


def test_other_methods_and_paths_are_as_without_it(server: Server) -> None:
    asked = [("POST", "/"), ("HEAD", "/"), ("OPTIONS", "/"), ("PUT", "/page/script.js"), ("GET", "/page")]
    asked += [("GET", "/page/index.html"), ("GET", "/page/__init__.py"), ("GET", "/page/..%2fapp.py")]
    with (
        Server("--model", DEMO, "--ctx", 256, "--draft", "off", "--no-page", key=None) as without,
        server.http() as a,
        without.http() as b,
    ):
        for method, path in asked:
            found, expected = a.request(method, path), b.request(method, path)
            assert (found.status_code, found.content) == (expected.status_code, expected.content), (
                method,
                path,
            )
        assert b.get("/").json() == {"status": "ok"} and b.get("/page/script.js").status_code == 404
        assert a.get("/openapi.json").content == b.get("/openapi.json").content


# -- in a browser --


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class Reader:
    """Somebody who reads the page; what the page asks for and complains of is kept."""

    def __init__(self, browser: Any, server: Server, **settings: Any):
        self.server = server
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type == "error" else None
        )
        self.page.goto(server.url)
        self.page.locator("#temperature").evaluate("node => node.value = 0")
        self.set_most(48)

    def set_most(self, tokens: int) -> None:
        self.page.locator("#max-tokens").evaluate("(node, n) => node.value = n", tokens)

    def add(self, **more: Any) -> None:
        """Have the page's requests ask for more than it does."""

        def asked(route: Any) -> None:
            route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), **more}))

        self.page.route("**/v1/chat/completions", asked)

    def ask(self, text: str) -> None:
        self.page.keyboard.type(text)  # the question has the focus
        self.page.keyboard.press("Enter")

    def read(self) -> str:
        """The last answer, when it is written."""
        self.page.locator("#stop").wait_for(state="hidden")
        return str(self.page.locator(".answer .tokens").last.text_content())

    def classes(self, selector: str) -> list[str]:
        """Who guessed each of the elements, by their classes."""
        found = self.page.locator(selector).evaluate_all("all => all.map(one => one.getAttribute('class'))")
        return [re.search(r"by-(\w+)", names)[1] for names in found]  # type: ignore[index]


@pytest.fixture
def reader(browser: Any, server: Server) -> Iterator[Reader]:
    reader = Reader(browser, server)
    yield reader
    assert not reader.complaints
    assert reader.asked and all(url.startswith((f"{server.url}/", "data:")) for url in reader.asked)
    reader.context.close()


def api(server: Server, messages: list[dict[str, str]], **more: Any) -> str:
    """What the API answers to the same request."""
    asked = {"messages": messages, "temperature": 0, "max_tokens": 48, **more}
    with server.http() as http:
        return str(http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"])


def told(server: Server, content: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokens and steps of the answer to a question, from the API."""
    asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 48}
    with server.http() as http:
        lines = http.post(
            "/v1/chat/completions", json={**asked, "stream": True, "entmtp": True}
        ).text.splitlines()
    parts = [json.loads(line[6:])["entmtp"] for line in lines if line.startswith("data: {")]
    return [t for part in parts for t in part["tokens"]], [s for part in parts for s in part["steps"]]


def test_conversation(reader: Reader, server: Server) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    reader.ask(QUESTION)
    first = reader.read()
    assert first == api(server, messages) and len(first) > 20

    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And\npears?"}]
    reader.page.keyboard.type("And")
    reader.page.keyboard.press("Shift+Enter")
    reader.ask("pears?")
    second = reader.read()
    assert second == api(server, messages)
    assert reader.page.locator(".question").all_text_contents() == [QUESTION, "And\npears?"]
    assert second in reader.page.locator("#said").text_content()  # what a screen reader says

    reader.page.get_by_role("button", name="Regenerate").click()
    assert reader.read() == second
    assert reader.page.locator(".answer").count() == 2

    reader.page.reload()
    assert reader.page.locator(".question, .answer").all_text_contents() == [
        QUESTION,
        first,
        "And\npears?",
        second,
    ]
    reader.page.get_by_role("button", name="New chat").click()
    assert reader.page.locator(".question, .answer").count() == 0
    reader.set_most(48)
    reader.page.locator("#temperature").evaluate("node => node.value = 0")
    reader.ask(QUESTION)
    assert reader.read() == first


def test_every_token_is_shaded_and_has_its_entropy(reader: Reader, server: Server) -> None:
    tokens, _ = told(server, QUESTION)
    reader.ask(QUESTION)
    reader.read()
    expected = [next(iter(t["source"]), "none") for t in tokens]
    assert set(expected) == {"none", "heads"}
    assert reader.classes(".token") == reader.classes(".point") == expected
    assert len(reader.page.locator(".running").get_attribute("points").split()) == len(tokens)
    grounds = reader.page.locator(".token").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert (
        len({(who, ground) for who, ground in zip(expected, grounds, strict=True)}) == len(set(grounds)) == 2
    )
    # higher is further up
    heights = reader.page.locator(".point").evaluate_all(
        "all => all.map(one => Number(one.getAttribute('cy')))"
    )
    low, high = (f(range(len(tokens)), key=lambda i: tokens[i]["entropy"]) for f in (min, max))
    assert heights[low] == max(heights) and heights[high] == min(heights)
    assert set(reader.classes("#legend li")) == {"none", *SOURCES}
    assert re.search(
        r"\d tokens/s .* tokens a pass .* guesses right", reader.page.locator(".figures").inner_text()
    )


def test_tree_of_a_token_with_the_keyboard_alone(reader: Reader, server: Server) -> None:
    tokens, steps = told(server, QUESTION)
    reader.ask(QUESTION)
    reader.read()
    page = reader.page
    page.keyboard.press("Shift+Tab")  # from the question back to Regenerate, and to the answer
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className").startswith("token")
    assert page.locator("#tree svg").count() == 0  # the first token has no step
    assert "before anything was drafted" in page.locator("#caption").inner_text()
    for token in tokens[1:12]:
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == token["text"]
        step = steps[token["step"] - 1]
        of_step = [t for t in tokens if t["step"] == token["step"]]
        left = [t for t in of_step if t["node"] is None]
        shown = page.locator("#tree title").all_text_contents()
        assert len(shown) == len(step["texts"]) + len(left)
        said = [json.loads(re.match(r'"(?:[^"\\]|\\.)*"', title)[0]) for title in shown]  # type: ignore[index]
        assert said == [*step["texts"], *(t["text"] or t.get("piece", "") for t in left)]
        assert page.locator("#tree .node.taken").count() == 1 + len(of_step)
        assert page.locator("#tree .edge").count() == len(shown) - 1
        assert page.locator("#tree .node.here title").text_content().startswith(json.dumps(token["text"]))
        assert reader.classes("#tree .node.here") == [next(iter(token["source"]), "none")]
    page.keyboard.press("Home")
    assert page.locator(".token").first.evaluate("node => node === document.activeElement")
    page.keyboard.press("ArrowDown")  # to the line below, if there is one
    assert page.evaluate("document.activeElement.className").startswith("token")


def test_tree_under_the_pointer(reader: Reader) -> None:
    reader.ask(QUESTION)
    reader.read()
    reader.page.locator(".token").nth(5).hover()
    assert reader.page.locator("#tree svg").count() == 1
    assert reader.page.locator(".token.shown, .point.shown").count() == 2
    box = reader.page.locator(".curve svg").bounding_box()
    reader.page.mouse.move(box["x"] + 3, box["y"] + 10)
    assert "shown" in reader.page.locator(".token").first.get_attribute("class")


def test_escape_stops_the_answer(reader: Reader, server: Server) -> None:
    reader.set_most(1000)
    reader.add(min_tokens=1000, n=16)  # it cannot be over by itself
    reader.ask(QUESTION)
    reader.page.locator(".token").nth(3).wait_for()
    reader.page.keyboard.press("Escape")
    text = reader.read()
    assert "Stopped." in reader.page.locator(".answer").inner_text()
    left = 'entmtp_requests_total{path="/v1/chat/completions",status="499"}'
    server.until(lambda m: m[left] == 1)
    whole = api(server, [{"role": "user", "content": QUESTION}], max_tokens=1000, min_tokens=1000)
    assert text and text[: len(whole)] == whole[: len(text)]
    # what came is part of the conversation
    kept = json.loads(reader.page.evaluate("sessionStorage.getItem('entmtp-talk')"))
    assert kept[-1] == {"role": "assistant", "content": text}


def test_what_was_written_is_never_html(reader: Reader) -> None:
    page = reader.page
    talk = [{"role": "user", "content": HTML}, {"role": "assistant", "content": HTML}]
    page.evaluate("talk => sessionStorage.setItem('entmtp-talk', JSON.stringify(talk))", talk)
    page.reload()
    reader.set_most(100)

    reader.add(grammar=f"root ::= {json.dumps(HTML)}")  # have the model say it
    reader.ask(HTML)
    assert reader.read() == HTML
    for i in range(0, page.locator(".token").count(), 5):
        page.locator(".token").nth(i).hover()
    assert page.locator(".question, .answer .tokens, .answer.tokens").all_text_contents() == [HTML] * 4
    assert page.locator("#talk script, #talk img, #talk b, #step img").count() == 0
    assert page.title() == "EntMTP"


def test_policy_of_the_page_holds(browser: Any, server: Server) -> None:
    reader = Reader(browser, server)
    reader.page.evaluate(
        """() => { const made = document.createElement("script"); made.textContent = "document.title = 'hit'";
        document.body.append(made); document.body.setAttribute("style", "color: red");
        return fetch("http://127.0.0.1:9/").catch(() => 0) }"""
    )
    assert reader.page.title() == "EntMTP"
    said = " ".join(reader.complaints)
    assert said.count("Content Security Policy") >= 3
    reader.context.close()


def test_dark_and_light(browser: Any, server: Server) -> None:
    def ground(reader: Reader) -> int:
        colour = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    for scheme, other in (("light", "dark"), ("dark", "light")):
        reader = Reader(browser, server, color_scheme=scheme)
        before = ground(reader)
        assert (before > 600) == (scheme == "light") and (before < 150) == (scheme == "dark")
        reader.page.get_by_role("button", name=other.title(), exact=True).click()
        assert (ground(reader) > 600) == (other == "light")
        reader.page.reload()  # a choice stays
        assert (ground(reader) > 600) == (other == "light")
        reader.context.close()


def test_narrow(browser: Any, server: Server) -> None:
    reader = Reader(browser, server, viewport={"width": 340, "height": 640})
    reader.ask("How " * 40)
    reader.read()
    reader.page.locator(".token").nth(4).hover()
    assert reader.page.evaluate("document.scrollingElement.scrollWidth") == 340
    box = reader.page.locator("#question").bounding_box()
    assert box["y"] + box["height"] < 640
    reader.context.close()


def keep_asking(server: Server, over: threading.Event) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 1900, "min_tokens": 1900, "stream": True}
    while not over.is_set():
        with server.http() as http, http.stream("POST", "/v1/completions", json=asked) as response:
            for _ in response.iter_lines():
                if over.is_set():
                    break


def test_key_and_company(browser: Any, shared: Server) -> None:
    """A server that wants a key, and answers several at a time."""
    reader = Reader(browser, shared)
    page = reader.page
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Enter")
    page.locator("#question").click()
    reader.ask(QUESTION)
    page.get_by_text("Invalid API key").first.wait_for()
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    page.locator("#model option").wait_for(state="attached")
    stored = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
    assert KEY in stored[0] and KEY not in stored[1]

    page.get_by_role("button", name="New chat").click()
    with ThreadPoolExecutor(1) as others:
        over = threading.Event()
        other = others.submit(keep_asking, shared, over)
        shared.until(lambda m: m["entmtp_requests_running"] == 1)
        reader.ask(QUESTION)
        reader.read()
        over.set()
        other.result()
    assert "other answers shared its passes" in page.locator(".figures").inner_text()
    assert page.locator(".token").count() == page.locator(".point").count() > 10
    reader.context.close()
