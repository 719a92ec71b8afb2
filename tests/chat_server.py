"""A chat model that is none: a local server that answers, waits, refuses or babbles as it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers with what ``replies`` says, one after the other: text, or status and headers."""

    def __init__(self) -> None:
        self.replies: list[object] = []
        self.asked: list[dict] = []
        self.heads: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, **body})
                outer.heads.append(dict(self.headers))
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if isinstance(reply, float):
                    outer.gone.wait(reply)
                    reply = "late"
                status, headers, text = reply if isinstance(reply, tuple) else (200, {}, reply)
                if status == 200 and isinstance(text, str):
                    text = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                raw = json.dumps(text).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except BrokenPipeError:
                    pass

            def log_message(self, *arguments: object) -> None:
                pass

        self.gone = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.gone.set()
        self._server.shutdown()
        self._server.server_close()
