//! The objects for packets and for frames, with one set of maps.

use std::path::PathBuf;

use aya::{Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::kernel::Kernel;

/// Both, loaded. Maps are pinned for a moment, in a file system that only the calling thread sees.
pub(crate) fn load() -> (Kernel, Ebpf) {
    let both = || {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, private, none).unwrap();
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).unwrap();
        let maps = ["flows_in", "flows_out", "members", "counters"];
        let at = |map: &str| PathBuf::from("/sys/fs/bpf").join(map);
        let (mut one, mut two) = (EbpfLoader::new(), EbpfLoader::new());
        for map in maps {
            one.map_pin_path(map, at(map));
            two.map_pin_path(map, at(map));
        }
        let kernel = Kernel::loaded(&mut one, 1024);
        let mut xdp = two.load(keelson_ebpf_objects::XDP).unwrap();
        keelson_ebpf_objects::load(xdp.program_mut("forward").unwrap()).unwrap();
        (kernel, xdp)
    };
    std::thread::spawn(both).join().unwrap()
}
