//! Programs are loaded whatever else the process has to do.

use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{self, TryRecvError};

use aya::Ebpf;
use keelson_ebpf_objects::undisturbed;
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

extern "C" fn nothing(_: i32) {}

/// The kernel breaks off verifying when a signal comes.
#[test]
#[expect(unsafe_code, reason = "there is no safe way to handle a signal")]
fn in_a_rain_of_signals() {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    let (tell, end) = mpsc::channel();
    let (begin, told) = mpsc::channel();
    let loading = std::thread::spawn(move || {
        told.recv().unwrap();
        let object = undisturbed(|| Ebpf::load(keelson_ebpf_objects::SOCKET));
        let mut object = object.unwrap().unwrap();
        let programs = object.programs_mut().map(|(_, p)| keelson_ebpf_objects::load(p));
        tell.send(programs.collect::<Result<Vec<()>, _>>()).unwrap();
        told.recv().unwrap();
    });
    begin.send(()).unwrap();
    let loaded = loop {
        // The thread is there until it is told again.
        pthread_kill(loading.as_pthread_t(), Signal::SIGUSR1).unwrap();
        match end.try_recv() {
            Ok(loaded) => break loaded,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => panic!("the other thread failed"),
        }
    };
    begin.send(()).unwrap();
    loading.join().unwrap();
    assert!(loaded.unwrap().len() > 5);
}
