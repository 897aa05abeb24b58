"""An MCP server over stdio with rows to learn from, for the tests of type: mcp, by the official SDK.

    mcp_server.py [--rows 25] [--page 10] [--without tools|resources] [--starts FILE]
                  [--log FILE] [--die-at CURSOR --died FILE]

Its tools give the same rows in different ways, and fail in different ways; its resources hold them as files of
several kinds. With --die-at it ends in the middle of the call that has this cursor, once: FILE says that it did.
Each start adds a line to the file of --starts, each call of the tool paged its cursor to that of --log.
"""

import argparse
import asyncio
import base64
import json
import os
import sys

import anyio
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=int, default=25)
parser.add_argument("--page", type=int, default=10)
parser.add_argument("--without", choices=["tools", "resources"], action="append", default=[])
parser.add_argument("--starts")
parser.add_argument("--log")
parser.add_argument("--die-at")
parser.add_argument("--died")
args = parser.parse_args()

ROWS = [
    {"id": i, "prompt": f"What is lesson {i}?", "completion": f"Lesson {i} is पाठ {i}."} for i in range(args.rows)
]


def result(structured=None, texts=(), error=False):
    content = [types.TextContent(type="text", text=text) for text in texts]
    return types.CallToolResult(content=content, structured_content=structured, is_error=error)


def page(cursor):
    start = int(cursor.removeprefix("row-")) if cursor else 0
    following = start + args.page
    more = f"row-{following}" if following < len(ROWS) else None
    return {"page": {"rows": ROWS[start:following], "next": more}}


async def paged(arguments):
    cursor = arguments.get("cursor")
    if args.log:
        with open(args.log, "a") as log:
            log.write(f"{cursor}\n")
    if cursor == args.die_at and args.die_at and not os.path.exists(args.died):
        open(args.died, "w").close()
        print("out of memory, says the server", file=sys.stderr, flush=True)
        os._exit(3)
    return result(page(cursor))


async def paged_text(arguments):
    return result(texts=[json.dumps(page(arguments.get("cursor")))])


async def texts(_):
    return result(texts=[json.dumps(row) for row in ROWS])


async def lines(_):
    return result(texts=["\n".join(json.dumps(row) for row in ROWS) + "\nno row\n"])


async def circle(arguments):
    return result({"page": {"rows": ROWS[:2], "next": arguments.get("cursor") or "row-2"}})


async def endless(arguments):
    return result({"page": {"rows": [], "next": int(arguments.get("cursor") or 0) + 1}})


async def refuses(_):
    return result(texts=["the table is locked"], error=True)


async def breaks(_):
    raise MCPError(types.INTERNAL_ERROR, "disk on fire")


async def stuck(_):
    await asyncio.sleep(3600)


async def prose(_):
    return result(texts=["There are many rows."])


async def environment(_):
    return result({"rows": [dict(os.environ)]})


async def big(_):
    return result({"rows": [{"text": "x" * (20 << 20)}]})


TOOLS = {
    tool.__name__: tool
    for tool in [paged, paged_text, texts, lines, circle, endless, refuses, breaks, stuck, prose, environment, big]
}

FILES = {
    "notes://all/lessons.jsonl": ("application/x-ndjson", "\n".join(json.dumps(row) for row in ROWS)),
    "notes://all/table": ("text/csv", "prompt,completion\nred,लाल\nblue,नीला\n"),
    "notes://all/array": ("application/json", json.dumps(ROWS[:3])),
    "notes://all/packed": (None, base64.b64encode(b'{"text": "packed"}\n').decode()),
}


async def list_tools(_, __):
    schema = {"type": "object"}
    return types.ListToolsResult(tools=[types.Tool(name=name, input_schema=schema) for name in TOOLS])


async def call_tool(_, params):
    if params.name not in TOOLS:
        raise MCPError(types.INVALID_PARAMS, f"no tool {params.name}")
    return await TOOLS[params.name](params.arguments or {})


async def list_resources(_, params):
    """One a page."""
    uris = list(FILES)
    at = int(params.cursor) if params and params.cursor else 0
    more = str(at + 1) if at + 1 < len(uris) else None
    resource = types.Resource(uri=uris[at], name=uris[at], mime_type=FILES[uris[at]][0])
    return types.ListResourcesResult(resources=[resource], next_cursor=more)


async def read_resource(_, params):
    uri = str(params.uri)
    if uri.startswith("notes://row/"):
        row = ROWS[int(uri.rsplit("/", 1)[1])]
        text = types.TextResourceContents(uri=uri, mime_type="application/json", text=json.dumps(row))
        return types.ReadResourceResult(contents=[text])
    if uri not in FILES:
        raise MCPError(-32002, f"Resource not found: {uri}")
    kind, text = FILES[uri]
    if kind is None:
        return types.ReadResourceResult(contents=[types.BlobResourceContents(uri=uri, blob=text)])
    return types.ReadResourceResult(contents=[types.TextResourceContents(uri=uri, mime_type=kind, text=text)])


async def main():
    handlers = {}
    if "tools" not in args.without:
        handlers |= {"on_list_tools": list_tools, "on_call_tool": call_tool}
    if "resources" not in args.without:
        handlers |= {"on_list_resources": list_resources, "on_read_resource": read_resource}
    if args.starts:
        with open(args.starts, "a") as starts:
            starts.write(f"{os.getpid()}\n")
    server = Server("lessons", version="1.0", **handlers)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


anyio.run(main)
