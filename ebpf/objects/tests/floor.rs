//! The oldest kernel is 5.10: nothing in the objects may be newer, except behind a switch that the loader sets. Needs no
//! kernel at all.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

use std::collections::{BTreeMap, BTreeSet, HashSet};

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

/// Linux before 6.13 counts the stacks of all functions that are under way at a time, each rounded up.
#[test]
fn the_stack_has_room_for_every_chain_of_calls() {
    const ROOM: u32 = 512;
    for (name, bytes) in ALL {
        let mut object = Object::parse(bytes).unwrap();
        let sections: HashSet<usize> =
            object.functions.keys().map(|(section, _)| *section).collect();
        object.relocate_calls(&sections).unwrap();
        for (program, of) in &object.programs {
            let linked = &object.functions[&of.function_key()].instructions;
            let deepest = Functions::of(linked).deepest(0);
            assert!(deepest <= ROOM, "{name}, {program}: {deepest} bytes");
        }
    }
}

/// The functions of a program, by where they begin: how much stack each uses, and which ones it calls.
struct Functions(BTreeMap<usize, (u32, BTreeSet<usize>)>);

impl Functions {
    fn of(linked: &[bpf_insn]) -> Self {
        let starts = (0..linked.len()).filter_map(|at| called(linked, at)).chain([0]);
        let mut functions: BTreeMap<_, _> =
            starts.map(|start| (start, (0, BTreeSet::new()))).collect();
        for at in 0..linked.len() {
            let (_, (stack, calls)) = functions.range_mut(..=at).next_back().unwrap();
            *stack = (*stack).max(stack_used(linked, at));
            calls.extend(called(linked, at));
        }
        Functions(functions)
    }

    fn deepest(&self, start: usize) -> u32 {
        const STEP: u32 = 32;
        let (stack, calls) = &self.0[&start];
        let below = calls.iter().map(|callee| self.deepest(*callee)).max().unwrap_or(0);
        (*stack).max(1).next_multiple_of(STEP) + below
    }
}

/// Where the function begins that an instruction calls.
fn called(linked: &[bpf_insn], at: usize) -> Option<usize> {
    const CALL: u8 = 0x85;
    const OF_FUNCTION: u8 = 1;
    let bpf_insn { code, imm, .. } = linked[at];
    let is_call = code == CALL && linked[at].src_reg() == OF_FUNCTION;
    is_call.then(|| (at + 1).checked_add_signed(imm as isize).unwrap())
}

/// How far below the frame's end an instruction reaches.
fn stack_used(linked: &[bpf_insn], at: usize) -> u32 {
    const FRAME: u8 = 10;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let instruction = &linked[at];
    let offset = match instruction.code & 7 {
        1 if instruction.src_reg() == FRAME => i32::from(instruction.off),
        2 | 3 if instruction.dst_reg() == FRAME => i32::from(instruction.off),
        _ if instruction.code == COPY && instruction.src_reg() == FRAME => {
            let next = linked
                .get(at + 1)
                .filter(|next| next.code == ADD && next.dst_reg() == instruction.dst_reg());
            next.map_or(0, |next| next.imm)
        }
        _ => 0,
    };
    offset.min(0).unsigned_abs()
}
