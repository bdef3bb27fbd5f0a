//! Reading back what the kernel has.

use super::Nft;
use super::attribute::{Reader, read_text, read_u32, read_u64};
use super::batch::{GET_CHAIN, GET_ELEMENT, GET_GENERATION, GET_RULE, GET_SET, GET_TABLE, Table};
use super::error::NftError;
use super::expression::{STAMP_KIND, Verdict, find_user_data};

/// A table as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableFound {
    /// Family number.
    pub family: u8,
    /// Name.
    pub name: String,
    /// The bytes given to [`super::Batch::create_table`].
    pub stamp: Option<Vec<u8>>,
}

/// A chain as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainFound {
    /// Name.
    pub name: String,
    /// Hook number and priority of a base chain.
    pub hook: Option<(u32, i32)>,
}

/// A rule as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFound {
    /// Chain.
    pub chain: String,
    /// Handle, for [`super::Batch::delete_rule`].
    pub handle: u64,
    /// The bytes given to [`super::Rule::stamp`].
    pub stamp: Option<Vec<u8>>,
    /// The text given to [`super::Rule::comment`].
    pub comment: Option<String>,
}

/// A set or map as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetFound {
    /// Name.
    pub name: String,
    /// Flags.
    pub flags: u32,
    /// Key length in bytes.
    pub key_len: u32,
    /// Value length in bytes, 0 without values or with verdicts.
    pub value_len: u32,
}

/// An element, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct ElementFound<'a> {
    /// Key; in sets of ranges the first key.
    pub key: &'a [u8],
    /// Last key in sets of ranges over several fields.
    pub last: Option<&'a [u8]>,
    /// True for the element that ends a range in sets over a single field.
    pub ends_range: bool,
    /// Value of a map.
    pub value: &'a [u8],
    /// Verdict of a verdict map.
    pub verdict: Option<Verdict<'a>>,
}

impl Nft {
    /// The number of the ruleset's generation: any change by anyone makes another one.
    pub fn generation(&mut self) -> Result<u32, NftError> {
        let mut generation = None;
        self.request(
            GET_GENERATION,
            false,
            0,
            |_| {},
            |_, body| {
                generation = Reader::find(body, 1).map(read_u32);
            },
        )?;
        generation.ok_or(NftError::Malformed("no generation id"))
    }

    /// All tables of all families.
    pub fn tables(&mut self) -> Result<Vec<TableFound>, NftError> {
        let mut tables = Vec::new();
        self.request(
            GET_TABLE,
            true,
            0,
            |_| {},
            |family, body| {
                tables.push(TableFound {
                    family,
                    name: Reader::find(body, 1).map_or("", read_text).to_owned(),
                    stamp: Reader::find(body, 6)
                        .and_then(|data| find_user_data(data, STAMP_KIND))
                        .map(<[u8]>::to_vec),
                });
            },
        )?;
        Ok(tables)
    }

    /// The table, if it exists.
    pub fn table(&mut self, table: Table<'_>) -> Result<Option<TableFound>, NftError> {
        let tables = self.tables()?;
        Ok(tables
            .into_iter()
            .find(|found| found.family == table.family as u8 && found.name == table.name))
    }

    /// The chains of a table.
    pub fn chains(&mut self, table: Table<'_>) -> Result<Vec<ChainFound>, NftError> {
        let mut chains = Vec::new();
        // The kernel does not filter chains by table.
        self.request(
            GET_CHAIN,
            true,
            table.family as u8,
            |_| {},
            |_, body| {
                if Reader::find(body, 1).map(read_text) == Some(table.name) {
                    chains.push(ChainFound {
                        name: Reader::find(body, 3).map_or("", read_text).to_owned(),
                        hook: Reader::find(body, 4).map(|hook| {
                            let number = |kind| Reader::find(hook, kind).map_or(0, read_u32);
                            (number(1), number(2).cast_signed())
                        }),
                    });
                }
            },
        )?;
        Ok(chains)
    }

    /// The rules of a table, in order within each chain.
    pub fn rules(&mut self, table: Table<'_>) -> Result<Vec<RuleFound>, NftError> {
        let mut rules = Vec::new();
        self.request(
            GET_RULE,
            true,
            table.family as u8,
            |w| w.text(1, table.name),
            |_, body| {
                let user_data = Reader::find(body, 7).unwrap_or(&[]);
                rules.push(RuleFound {
                    chain: Reader::find(body, 2).map_or("", read_text).to_owned(),
                    handle: Reader::find(body, 3).map_or(0, read_u64),
                    stamp: find_user_data(user_data, STAMP_KIND).map(<[u8]>::to_vec),
                    comment: find_user_data(user_data, 0).map(|text| read_text(text).to_owned()),
                });
            },
        )?;
        Ok(rules)
    }

    /// The sets and maps of a table.
    pub fn sets(&mut self, table: Table<'_>) -> Result<Vec<SetFound>, NftError> {
        let mut sets = Vec::new();
        self.request(
            GET_SET,
            true,
            table.family as u8,
            |w| w.text(1, table.name),
            |_, body| {
                let number = |kind| Reader::find(body, kind).map_or(0, read_u32);
                sets.push(SetFound {
                    name: Reader::find(body, 2).map_or("", read_text).to_owned(),
                    flags: number(3),
                    key_len: number(5),
                    value_len: number(7),
                });
            },
        )?;
        Ok(sets)
    }

    /// Hands every element of a set to `visit`, without holding them all.
    pub fn elements(
        &mut self,
        table: Table<'_>,
        set: &str,
        mut visit: impl FnMut(ElementFound<'_>),
    ) -> Result<(), NftError> {
        self.request(
            GET_ELEMENT,
            true,
            table.family as u8,
            |w| {
                w.text(1, table.name);
                w.text(2, set);
            },
            |_, body| {
                let list = Reader::find(body, 3).unwrap_or(&[]);
                for (_, element) in Reader::new(list) {
                    visit(read_element(element));
                }
            },
        )
    }
}

pub(crate) fn read_element(bytes: &[u8]) -> ElementFound<'_> {
    let mut found =
        ElementFound { key: &[], last: None, ends_range: false, value: &[], verdict: None };
    for (kind, value) in Reader::new(bytes) {
        match kind {
            1 => found.key = Reader::find(value, 1).unwrap_or(&[]),
            2 => {
                found.value = Reader::find(value, 1).unwrap_or(&[]);
                found.verdict = Reader::find(value, 2).and_then(|verdict| {
                    let code = Reader::find(verdict, 1).map(read_u32)?.cast_signed();
                    Verdict::from_code(code, Reader::find(verdict, 2).map_or("", read_text))
                });
            }
            3 => found.ends_range = read_u32(value) & 1 != 0,
            10 => found.last = Reader::find(value, 1),
            _ => {}
        }
    }
    found
}
