"""A judge for tests: an HTTP server in a separate process that answers like OpenAI's chat completions.

    python judge_server.py LOG [FAULT [NUMBER]]

It prints its port, and writes each successful request to LOG as a line of JSON. The rating depends only on the request;
with FAULT `moody`, also on how often it was sent. Other FAULTs: `die` ends the process after NUMBER requests. A status
such as `429`, `retry_after` (429 with Retry-After of 2 s), `slow`, `drip`, `malformed`, `html`, `parts` (content
that is not text), `surrogate`, `deep` and `empty` break the first NUMBER answers to each request. `no_rating` omits the
rating of one request in NUMBER. `leak` and `echo` always return the Authorization header, in an error or a judgment.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOG = Path(sys.argv[1])
FAULT = sys.argv[2] if len(sys.argv) > 2 else ""
NUMBER = int(sys.argv[3]) if len(sys.argv) > 3 else 0
seen: Counter[str] = Counter()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with lock:
            seen[digest] += 1
            early = seen[digest] <= NUMBER
            if FAULT == "die" and seen.total() > NUMBER:
                os._exit(0)
        rating = 1 + int(digest, 16) % 10
        text = f"It could be worse. Rating: [[{rating}]]"
        if FAULT == "moody":
            text = f"Rating: [[{1 + (int(digest, 16) + seen[digest]) % 10}]]"
        if FAULT == "no_rating" and int(digest, 16) % NUMBER == 0:
            text = "I would rather not say."
        if FAULT == "leak":
            return self.reply(500, f"refused: {self.headers['Authorization']}")
        if early and FAULT.isdigit():
            return self.reply(int(FAULT), "busy")
        if FAULT == "echo":
            text += f" {self.headers['Authorization']}"
        if early and FAULT == "retry_after":
            return self.reply(429, "busy", retry_after=2)
        if early and FAULT == "html":
            return self.reply(200, "<html>busy</html>", content_type="text/html")
        if early and FAULT == "parts":
            text = [{"type": "text", "text": text}]
        if early and FAULT == "slow":
            time.sleep(3)
        if early and FAULT == "malformed":
            return self.reply(200, json.dumps({"choices": [{"delta": "?"}]}))
        if early and FAULT == "deep":
            return self.reply(200, "[" * 200_000)
        if early and FAULT == "drip":
            return self.drip()
        if early and FAULT == "surrogate":
            text = "Rating: [[5]] \ud800"
        elif early and FAULT == "empty":
            text = ""
        elif isinstance(text, str):
            with lock, LOG.open("a") as file:
                file.write(json.dumps(request) + "\n")
        message = {"role": "assistant", "content": text}
        return self.reply(200, json.dumps({"choices": [{"index": 0, "message": message}]}))

    def drip(self) -> None:
        """Send single bytes slowly, so that no single read times out."""
        try:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass  # the client gave up

    def reply(self, status: int, body: str, content_type: str = "application/json", retry_after: int = 0) -> None:
        content = body.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            if retry_after:
                self.send_header("Retry-After", str(retry_after))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client gave up

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
