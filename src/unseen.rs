//! Characters that a reader cannot see, or that change what others look like. Texts of apps and destinations are
//! shown with these written out.
//!
//! Not here: how a terminal (`tools`) and the page (`owner`) show them.

/// Whether a character shows nothing, or changes where others are shown.
pub fn is_unseen(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_any_script_are_seen_and_what_turns_them_is_not() {
        assert!("aé😀漢ש #…".chars().all(|character| !is_unseen(character)));
        for character in [
            '\0',
            '\u{1b}',
            '\u{ad}',
            '\u{200b}',
            '\u{202e}',
            '\u{2066}',
            '\u{feff}',
            '\u{e0041}',
        ] {
            assert!(is_unseen(character), "{}", character.escape_unicode());
        }
    }
}
