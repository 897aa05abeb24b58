// For node --require: whatever port a server wants to listen on, it gets a free one of loopback, and says so.
const net = require("node:net");
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...args) {
  const done = args.filter((arg) => typeof arg === "function");
  this.once("listening", () => console.error(`port ${this.address().port}`));
  return listen.call(this, { host: "127.0.0.1", port: 0 }, ...done);
};
