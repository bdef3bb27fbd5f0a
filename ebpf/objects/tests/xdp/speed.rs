//! What the program costs: `cargo test -p keelson-ebpf-objects --test xdp -- --ignored --nocapture speed`.

use std::cell::RefCell;

use aya::programs::{TestRun, TestRunOptions, Xdp};

use crate::bytes::{ACK, tcp};
use crate::stage::{Stage, WAYS};

const RUNS: u32 = 1_000_000;

/// The kernel runs the program again on what the run before made of the frame, which is no frame to the node any more;
/// so most runs are of a frame that is left to others. What a frame costs that is sent on is measured by `bench_xdp`.
#[test]
#[ignore = "prints figures"]
fn speed() {
    let stage = RefCell::new(Stage::new());
    for [client, service, _] in WAYS {
        let stage = stage.borrow();
        let frame = stage.to_node(&tcp(ACK, client, service));
        let program: &Xdp = stage.xdp.program("forward").unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(&frame), repeat: RUNS, ..Default::default() };
        let result = stage.netns.run(|| program.test_run(options)).unwrap().unwrap();
        println!("of no known connection: {} ns", result.duration.as_nanos());
    }
}
