//! Loads every program into the running kernel and prints how large it is and what the verifier had to do.
#![expect(clippy::print_stdout, reason = "prints a table")]

use aya::EbpfLoader;
use aya::programs::{Program, ProgramInfo};

type Error = Box<dyn std::error::Error>;

const OBJECTS: [(&str, &[u8]); 2] =
    [("packet", keelson_ebpf_objects::PACKET), ("socket", keelson_ebpf_objects::SOCKET)];

fn main() -> Result<(), Error> {
    println!(
        "| object | program | instructions | verified | native bytes |\n|---|---|---|---|---|"
    );
    for (object, bytes) in OBJECTS {
        // With all that a new kernel has: the largest that a program becomes.
        let mut loaded =
            EbpfLoader::new().override_global("HAS_SET_RETVAL", &1_u8, false).load(bytes)?;
        let mut programs: Vec<_> = loaded.programs_mut().collect();
        programs.sort_by_key(|(name, _)| *name);
        for (name, program) in programs {
            let info = load(program)?;
            println!(
                "| {object} | {name} | {} | {} | {} |",
                info.size_translated().unwrap_or(0) / 8,
                info.verified_instruction_count().unwrap_or(0),
                info.size_jitted(),
            );
        }
    }
    Ok(())
}

fn load(program: &mut Program) -> Result<ProgramInfo, Error> {
    match program {
        Program::CgroupSock(program) => program.load()?,
        Program::CgroupSockAddr(program) => program.load()?,
        Program::SchedClassifier(program) => program.load()?,
        _ => return Err("a program of another kind".into()),
    }
    Ok(program.info()?)
}
