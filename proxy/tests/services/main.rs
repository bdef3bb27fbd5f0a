//! The behaviour suite: each row of it is one behaviour, and runs against every backend that this
//! kernel can do, with real packets between network namespaces of its own.
//!
//! `cargo test -p keelson-proxy --test services -- [FILTER...] [--backend NAME] [--test-threads N]`.
//! A filter is part of `backend::file::behaviour`. The binary needs nothing but a kernel with /proc:
//! it also runs as it is in a virtual machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "tests")]

mod behaviour;
mod clock;
mod corners;
mod crash;
mod direct;
mod ebpf;
mod flows;
mod growth;
mod guards;
mod harness;
mod ipvs;
mod kernel_clients;
mod lasting;
mod metrics;
mod needs;
mod oracle;
mod policies;
mod refusals;
mod restarts;
mod scale;
mod sequences;
mod side_by_side;
mod stage;
mod switching;
#[path = "../../../ebpf/objects/tests/packet/transfer.rs"]
mod transfer;
mod whole;
mod world;
mod xdp;

use std::process::ExitCode;

use harness::Row;

/// Every behaviour, by file.
fn rows() -> Vec<Row> {
    [
        behaviour::ROWS,
        oracle::ROWS,
        policies::ROWS,
        guards::ROWS,
        corners::ROWS,
        flows::ROWS,
        ipvs::ROWS,
        ebpf::ROWS,
        direct::ROWS,
        growth::ROWS,
        refusals::ROWS,
        needs::ROWS,
        xdp::ROWS,
        whole::ROWS,
        metrics::ROWS,
        clock::ROWS,
        kernel_clients::ROWS,
        lasting::ROWS,
        switching::ROWS,
        scale::ROWS,
        sequences::ROWS,
        side_by_side::ROWS,
        crash::ROWS,
        restarts::ROWS,
    ]
    .concat()
}

fn main() -> ExitCode {
    if crash::is_victim() {
        return crash::be_victim();
    }
    stage::ebpf::prepare();
    let code = harness::run(&rows());
    stage::ebpf::tidy();
    code
}
