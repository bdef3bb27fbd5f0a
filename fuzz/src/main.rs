//! libFuzzer's program with every target; the environment says which one runs.
#![no_main]

use std::sync::OnceLock;

use keelson_fuzz::Target;

static CHOSEN: OnceLock<Target> = OnceLock::new();

fn choose() {
    let name = std::env::var("KEELSON_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = keelson_fuzz::target(&name) else {
        eprintln!("KEELSON_FUZZ_TARGET={name:?} is no target; run this with `cargo xtask fuzz`");
        std::process::exit(2);
    };
    CHOSEN.get_or_init(|| target);
}

libfuzzer_sys::fuzz_target!(init: choose(), |input: &[u8]| {
    if let Some(target) = CHOSEN.get() {
        (target.run)(input);
    }
});
