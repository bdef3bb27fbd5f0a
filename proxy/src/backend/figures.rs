//! What backends count of their own work, for the metrics.

use crate::model::Family;

/// Counted since it was last asked for; nothing where a mode has no such thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    families: [FamilyFigures; 2],
    /// Where Services are in maps of a limited size: how full those are now.
    pub maps: Vec<MapFill>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    pub map: &'static str,
    pub entries: u32,
    pub max_entries: u32,
    /// It becomes larger before it is full.
    pub may_grow: bool,
}

/// What concerns one IP family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyFigures {
    /// Attempts that the kernel, or the program in between, refused.
    pub failures: u64,
    /// Changes that failed, so that everything had to be compared.
    pub partial_failures: u64,
    /// Refused removals of what nobody needs any more.
    pub cleanup_failures: u64,
    /// Where changes consist of rules.
    pub rules: Vec<TableRules>,
}

/// The rules in one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRules {
    pub table: &'static str,
    /// Rules of ours in it.
    pub all: i64,
    /// Rules that the last change wrote.
    pub written: i64,
}

impl Figures {
    #[must_use]
    pub fn of_maps(maps: Vec<MapFill>) -> Self {
        Figures { maps, ..Figures::default() }
    }

    #[must_use]
    pub fn of(&self, family: Family) -> &FamilyFigures {
        &self.families[family as usize]
    }

    pub fn of_mut(&mut self, family: Family) -> &mut FamilyFigures {
        &mut self.families[family as usize]
    }
}
