"""A stand-in for Qdrant's REST server, for the tests of type: qdrant.

Requests are read and answers are made by the models of qdrant-client, and points are found by its local mode, so
what goes over the wire is what that library says. `--check` proves it: the library's own client scrolls through this
server and through the local mode, and both must give the same.

    qdrant_server.py points.jsonl [--collection lessons] [--api-key KEY] [--log FILE]
    qdrant_server.py --check

Each line of points.jsonl is {"id": number or UUID, "payload": {...} or null}. The first line on stdout is the port.
The server ends with its standard input. --log takes down the offset of each request, a line each.
"""

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pydantic
from qdrant_client import QdrantClient, models


def local(points, collection):
    client = QdrantClient(":memory:")
    client.create_collection(
        collection, vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    structs = [
        models.PointStruct(id=point["id"], payload=point["payload"], vector=[1.0, 0.0]) for point in points
    ]
    if structs:
        client.upsert(collection, structs)
    return client


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, content_type="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def failed(self, status, why):
        self.answer(status, {"status": {"error": why}, "time": 0.0})

    def refused(self):
        """Whether the key is wrong, as `auth.rs` of Qdrant judges."""
        if not self.server.key or self.headers.get("api-key") == self.server.key:
            return False
        given = self.headers.get("api-key")
        why = "Invalid API key or JWT" if given else "Must provide an API key or an Authorization bearer token"
        self.answer(401, why.encode(), "text/plain")
        return True

    def do_GET(self):
        if self.path == "/":
            # What the client compares its own version with.
            self.answer(200, {"title": "qdrant - vector search engine", "version": "1.20.0"})
        else:
            self.answer(404, b"", "text/plain")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.refused():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) != 4 or parts[0] != "collections" or parts[2:] != ["points", "scroll"]:
            self.answer(404, b"", "text/plain")
            return
        try:
            request = models.ScrollRequest.model_validate_json(body)
        except pydantic.ValidationError as error:
            self.failed(400, f"Format error in JSON body: {error.errors()[0]['msg']}")
            return
        with self.server.lock:
            if self.server.log:
                self.server.log.write(f"{json.dumps(request.offset)}\n")
                self.server.log.flush()
            if not self.server.points.collection_exists(parts[1]):
                self.failed(404, f"Not found: Collection `{parts[1]}` doesn't exist!")
                return
            found, following = self.server.points.scroll(
                parts[1],
                scroll_filter=request.filter,
                limit=request.limit or 10,
                offset=request.offset,
                with_payload=True if request.with_payload is None else request.with_payload,
                with_vectors=bool(request.with_vector),
            )
        result = models.ScrollResult(points=found, next_page_offset=following)
        # Optional fields that are not there are left out, but for the offset, as Qdrant does.
        answer = {"result": json.loads(result.model_dump_json(exclude_none=True)), "status": "ok", "time": 0.0}
        answer["result"].setdefault("next_page_offset", None)
        self.answer(200, answer)


def serve(points, key, log=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.points, server.key, server.log, server.lock = points, key, log, threading.Lock()
    return server


def check():
    """The library's client over this server gives what the local mode gives."""
    points = [{"id": i, "payload": {"n": i, "odd": i % 2 == 1, "in": {"side": f"पाठ {i}"}}} for i in range(1, 40)]
    points += [{"id": "5b1d3c9e-7f38-4a57-9b8e-0a7f6c5d4e3f", "payload": {"n": 99}}]
    memory = local(points, "lessons")
    server = serve(memory, "secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    remote = QdrantClient(url=url, api_key="secret")
    odd = models.Filter(must=[models.FieldCondition(key="odd", match=models.MatchValue(value=True))])
    for options in [{}, {"scroll_filter": odd}, {"with_payload": ["n", "in.side"]}, {"limit": 7}, {"limit": 100}]:
        rows = {"remote": [], "local": []}
        for name, client in [("remote", remote), ("local", memory)]:
            offset = None
            while True:
                page, offset = client.scroll("lessons", offset=offset, **options)
                rows[name] += [(point.id, point.payload) for point in page]
                if offset is None:
                    break
        assert rows["remote"] == rows["local"] and rows["remote"], options
        print(f"{options}: {len(rows['remote'])} points, the same over HTTP and in memory")
    for wrong, status in [(QdrantClient(url=url, api_key="other"), 401), (QdrantClient(url=url), 401)]:
        try:
            wrong.scroll("lessons")
        except Exception as error:
            assert getattr(error, "status_code", None) == status, error
        else:
            raise AssertionError("a wrong key was accepted")
    try:
        remote.scroll("other")
    except Exception as error:
        assert error.status_code == 404, error
    else:
        raise AssertionError("a collection that is not there was read")
    print("all checks passed")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("points", nargs="?")
    parser.add_argument("--collection", default="lessons")
    parser.add_argument("--api-key")
    parser.add_argument("--log", type=argparse.FileType("w"))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        check()
        return
    with open(args.points, encoding="utf-8") as lines:
        points = [json.loads(line) for line in lines if line.strip()]
    server = serve(local(points, args.collection), args.api_key, args.log)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
