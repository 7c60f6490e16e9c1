//! How a command line of the kernel or of fw_cfg becomes words. Pure; `parameters` and the steward call it.
//!
//! Blanks (space, tab, line end) separate words. A double quote switches quoting on and off, anywhere in a word; inside
//! quotes blanks belong to the word. The quotes themselves go away, there is no escape character, and so a word cannot
//! contain a double quote. This splits exactly where the kernel splits its own command line. Trailing NUL bytes, with
//! which some loaders end a text, are no part of it.

use crate::limits::INIT_WORDS_MAX;

/// The words of a text.
///
/// # Errors
/// The cause, for a usage error: a quote that is not closed, bytes that are no text, too many words.
pub(super) fn split(text: &[u8]) -> Result<Vec<String>, String> {
    let end = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let text = std::str::from_utf8(&text[..end]).map_err(|_| "is not UTF-8".to_owned())?;
    if text.contains('\0') {
        return Err("contains a NUL byte".to_owned());
    }
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for letter in text.chars() {
        if letter == '"' {
            quoted = !quoted;
            word.get_or_insert_default();
        } else if letter.is_ascii_whitespace() && !quoted {
            words.extend(word.take());
        } else {
            word.get_or_insert_default().push(letter);
        }
    }
    if quoted {
        return Err("a double quote is not closed".to_owned());
    }
    words.extend(word);
    if words.len() > INIT_WORDS_MAX {
        return Err(format!("{} words, more than {INIT_WORDS_MAX}", words.len()));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn good(text: &str) -> Vec<String> {
        split(text.as_bytes()).expect("good words")
    }

    #[test]
    fn blanks_separate_and_quotes_hold_together() {
        assert_eq!(good("  serve g1\t--disk\nvda "), ["serve", "g1", "--disk", "vda"]);
        assert_eq!(good(r#"a="b c" "d e"f "" g"#), ["a=b c", "d ef", "", "g"]);
        assert_eq!(good("\"a\nb\""), ["a\nb"]);
        assert_eq!(good("x\0\0"), ["x"]);
        assert_eq!(good(" \n\0"), Vec::<String>::new());
    }

    #[test]
    fn what_is_no_command_line_is_refused() {
        assert_eq!(split(b"serve \"g1"), Err("a double quote is not closed".to_owned()));
        assert_eq!(split(b"serve \xff"), Err("is not UTF-8".to_owned()));
        assert_eq!(split(b"serve\0g1"), Err("contains a NUL byte".to_owned()));
        let many = "a ".repeat(INIT_WORDS_MAX + 1);
        assert_eq!(split(many.as_bytes()), Err(format!("257 words, more than {INIT_WORDS_MAX}")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = split(&bytes);
        }

        #[test]
        fn quoted_words_come_back(words in proptest::collection::vec("[^\"\0]{0,8}", 0..8)) {
            let text: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
            prop_assert_eq!(good(&text.join(" ")), words);
        }
    }
}
