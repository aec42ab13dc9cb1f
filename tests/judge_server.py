"""A judge as tests need it: a real HTTP server that speaks as an OpenAI-compatible one does."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers as an OpenAI-compatible server does; `reply(text, number of the question)` says what."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.asked, self.keys = reply, [], []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.send({"object": "list", "data": [{"id": "qwen", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.server.asked.append(text)
        said = self.server.reply(text, len(self.server.asked))
        if isinstance(said, int):
            self.send({"error": {"message": "broken"}}, said)
        else:
            self.send({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]})

    def send(self, body, status=200):
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@contextmanager
def serving(reply):
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def prefers(word):
    """Says which of the two answers holds a word."""

    def reply(text, _):
        first, second = text.partition("[Answer A]")[2].split("[Answer B]")
        return "T" if (word in first) == (word in second.rpartition("\n\n")[0]) else "A" if word in first else "B"

    return reply
