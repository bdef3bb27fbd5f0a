//! The program at XDP in the kernel, held to what the programs for packets do: with frames made by hand
//! (`BPF_PROG_TEST_RUN`), and with those of sockets between network namespaces of the tests' own. Needs root.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]
#![allow(dead_code, reason = "the tests of packets need more of the files that both have")]

#[path = "packet/bytes.rs"]
mod bytes;
#[path = "xdp/equality.rs"]
mod equality;
#[path = "xdp/frames.rs"]
mod frames;
#[path = "packet/kernel.rs"]
mod kernel;
#[path = "xdp/line.rs"]
mod line;
#[path = "xdp/objects.rs"]
mod objects;
#[path = "xdp/speed.rs"]
mod speed;
#[path = "xdp/stage.rs"]
mod stage;
#[path = "packet/transfer.rs"]
mod transfer;
#[path = "xdp/wire.rs"]
mod wire;
