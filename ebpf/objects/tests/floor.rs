//! The oldest kernel is 5.10: nothing in the objects may be newer, except behind a switch that the loader sets. Needs no
//! kernel at all.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

use std::collections::BTreeSet;

use aya_obj::Object;
use aya_obj::generated::bpf_insn;
use keelson_ebpf_objects::ALL;

/// The last helper of Linux 5.10, `bpf_redirect_peer`.
const LAST_HELPER: i32 = 155;
/// The last kind of map of Linux 5.10, `BPF_MAP_TYPE_INODE_STORAGE`.
const LAST_MAP: u32 = 28;
/// Newer helpers that are called only behind a switch: `bpf_set_retval` behind `HAS_SET_RETVAL`.
const SWITCHED: [(&str, i32); 1] = [("socket", 187)];

fn instructions(object: &Object) -> impl Iterator<Item = &bpf_insn> {
    object.functions.values().flat_map(|function| &function.instructions)
}

#[test]
fn only_helpers_that_linux_5_10_has() {
    const CALL: u8 = 0x85;
    const OF_HELPER: u8 = 0;
    for (name, bytes) in ALL {
        let object = Object::parse(bytes).unwrap();
        let calls = instructions(&object).filter(|i| i.code == CALL && i.src_reg() == OF_HELPER);
        let newer: BTreeSet<i32> = calls.map(|i| i.imm).filter(|n| *n > LAST_HELPER).collect();
        let switched = SWITCHED.iter().filter(|(object, _)| *object == name);
        assert_eq!(newer, switched.map(|(_, helper)| *helper).collect(), "{name}");
    }
}

/// Version 3 of the instruction set, without the atomic operations of Linux 5.12.
#[test]
fn only_instructions_that_linux_5_10_has() {
    for (name, bytes) in ALL {
        let object = Object::parse(bytes).unwrap();
        let newer: Vec<_> = with_positions(&object).filter(|(_, i)| is_newer(i)).collect();
        assert!(newer.is_empty(), "{name}: {newer:?}");
    }
}

fn with_positions(object: &Object) -> impl Iterator<Item = (String, &bpf_insn)> {
    object.functions.values().flat_map(|function| {
        let of = function.instructions.iter().enumerate();
        of.map(|(index, i)| (format!("{} + {index}", function.name), i))
    })
}

fn is_newer(instruction: &bpf_insn) -> bool {
    const ATOMIC: [u8; 2] = [0xc3, 0xdb];
    const JUMP_LONG: u8 = 0x06;
    const CLASS: u8 = 0x07;
    const OPERATION: u8 = 0xf8;
    const SWAP: u8 = 0xd0;
    const LOAD: u8 = 1;
    const LOAD_SIGNED: u8 = 0x80;
    let bpf_insn { code, off, imm, .. } = *instruction;
    match code & CLASS {
        // More than an addition whose result nobody takes.
        3 => ATOMIC.contains(&code) && imm != 0,
        // Signed division and sign extension by a register's move are told by the offset.
        4 | 7 => off != 0 || code & CLASS == 7 && code & OPERATION == SWAP,
        6 => code == JUMP_LONG,
        LOAD => code & 0xe0 == LOAD_SIGNED,
        _ => false,
    }
}

#[test]
fn only_kinds_of_maps_that_linux_5_10_has() {
    for (name, bytes) in ALL {
        let object = Object::parse(bytes).unwrap();
        for (map, definition) in &object.maps {
            assert!(definition.map_type() <= LAST_MAP, "{name}: {map}");
        }
    }
}
