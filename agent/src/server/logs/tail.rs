//! Where the last lines of a file begin, found from its end so that the size of the file does not
//! matter.

use std::io::{self, Read, Seek, SeekFrom};

const BLOCK: u64 = 16 * 1024;

/// The offset at which the last `lines` lines begin. An unfinished last line counts as one.
///
/// # Errors
/// When the file cannot be read.
pub fn offset(file: &mut (impl Read + Seek), lines: u64) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let mut missing = lines;
    let mut block_end = end;
    let mut block = Vec::new();
    while block_end > 0 {
        let start = block_end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.by_ref().take(block_end - start).read_to_end(&mut block)?;
        for (at, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let line_start = start + u64::try_from(at).unwrap_or(0) + 1;
            // The newline at the very end closes the last line, it does not begin another.
            if line_start == end {
                continue;
            }
            missing -= 1;
            if missing == 0 {
                return Ok(line_start);
            }
        }
        block_end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn tail(text: &[u8], lines: u64) -> Vec<u8> {
        let start = offset(&mut Cursor::new(text), lines).unwrap();
        text[usize::try_from(start).unwrap()..].to_vec()
    }

    #[test]
    fn the_last_lines_of_a_small_file() {
        assert_eq!(tail(b"a\nb\nc\n", 2), b"b\nc\n");
        assert_eq!(tail(b"a\nb\nc", 2), b"b\nc");
        assert_eq!(tail(b"a\nb\n", 9), b"a\nb\n");
        assert_eq!(tail(b"a\nb\n", 0), b"");
        assert_eq!(tail(b"", 3), b"");
        assert_eq!(tail(b"\n\n\n", 2), b"\n\n");
    }

    proptest! {
        #[test]
        fn as_splitting_the_whole_file_would_say(
            lines in prop::collection::vec(0_usize..6000, 0..12),
            open: bool,
            count in 1_u64..14,
        ) {
            let mut text: Vec<u8> =
                lines.iter().flat_map(|length| [vec![b'x'; *length], vec![b'\n']].concat()).collect();
            if open { text.extend_from_slice(b"rest"); }
            let all: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
            let skip = all.len().saturating_sub(usize::try_from(count).unwrap());
            prop_assert_eq!(tail(&text, count), all[skip..].concat());
        }
    }
}
