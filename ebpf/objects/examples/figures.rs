//! Loads every program into the running kernel and prints how large it is and what the verifier had to do.
#![expect(clippy::print_stdout, reason = "prints a table")]

use aya::programs::CgroupSockAddr;
use aya::{Ebpf, EbpfLoader};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    println!("| program | instructions | verified | native bytes |\n|---|---|---|---|");
    let mut socket = load(keelson_ebpf_objects::SOCKET)?;
    let mut names: Vec<String> = socket.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    for name in names {
        let program = socket.program_mut(&name).ok_or("program vanished")?;
        let program: &mut CgroupSockAddr = program.try_into()?;
        program.load()?;
        let info = program.info()?;
        println!(
            "| {name} | {} | {} | {} |",
            info.size_translated().unwrap_or(0) / 8,
            info.verified_instruction_count().unwrap_or(0),
            info.size_jitted(),
        );
    }
    Ok(())
}

fn load(object: &[u8]) -> Result<Ebpf, Error> {
    Ok(EbpfLoader::new().override_global("HAS_SET_RETVAL", &1_u8, true).load(object)?)
}
