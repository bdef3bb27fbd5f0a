//! Loads every program into the running kernel and prints how large it is and what the verifier had to do.
#![expect(clippy::print_stdout, reason = "prints a table")]

use std::fmt::Write;

use aya::EbpfLoader;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("Linux {}\n", kernel.trim());
    println!(
        "| object | program | instructions | verified | native bytes |\n|---|---|---|---|---|"
    );
    for (object, bytes) in keelson_ebpf_objects::ALL {
        // With all that a new kernel has: the largest that a program becomes.
        let table = table(object, bytes, 1).or_else(|_| table(object, bytes, 0))?;
        print!("{table}");
    }
    Ok(())
}

fn table(object: &str, bytes: &[u8], has_set_retval: u8) -> Result<String, Error> {
    let mut table = String::new();
    let mut loader = EbpfLoader::new();
    let mut loaded =
        loader.override_global("HAS_SET_RETVAL", &has_set_retval, false).load(bytes)?;
    let mut programs: Vec<_> = loaded.programs_mut().collect();
    programs.sort_by_key(|(name, _)| *name);
    for (name, program) in programs {
        keelson_ebpf_objects::load(program)?;
        let info = program.info()?;
        let verified = info.verified_instruction_count().map_or("?".into(), |n| n.to_string());
        writeln!(
            table,
            "| {object} | {name} | {} | {verified} | {} |",
            info.size_translated().unwrap_or(0) / 8,
            info.size_jitted(),
        )?;
    }
    Ok(table)
}
