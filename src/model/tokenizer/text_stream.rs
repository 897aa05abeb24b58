//! Decoding token by token, to the same text as decoding all tokens at once. The decoder of a `tokenizer.json`
//! is a chain of small steps, most of which look at one token at a time; each is run here with the little state
//! that it needs, so that a token costs the same wherever in an answer it stands. Knows nothing of grapheme
//! clusters or stop texts.

use std::sync::Arc;

use tokenizers::{Decoder, DecoderWrapper};

use super::{Special, Tokenizer, TokenizerError};

/// The decoding of one answer; made by [`Tokenizer::text_stream`] and to be used with that tokenizer.
#[derive(Clone)]
pub struct TextStream {
    stages: Vec<Stage>,
}

/// One step of the chain and what it remembers.
#[derive(Clone)]
enum Stage {
    /// Each token by itself.
    Each(Arc<DecoderWrapper>),
    /// Each token by itself, but the first is treated in a way of its own.
    FirstDiffers { decoder: Arc<DecoderWrapper>, first: bool },
    /// Each token by itself, but the last is treated in a way of its own, so that one is always held.
    LastDiffers { decoder: Arc<DecoderWrapper>, held: Option<String> },
    /// Tokens like `<0x0A>` are bytes. A run of them is text if all of it is UTF-8, else one U+FFFD for each
    /// byte; so a run is held until it ends.
    ByteFallback { run: Vec<u8> },
    /// The characters of tokens stand for bytes (GPT-2). What is not UTF-8 becomes U+FFFD; the beginning of a
    /// character is held until it is complete or cannot be.
    ByteLevel { pending: Vec<u8> },
    /// Behind a step that joins all tokens into one text: takes characters off its beginning.
    StripText { content: char, left: usize },
    /// No decoder: tokens with spaces between them.
    Spaced { first: bool },
    /// Steps that cannot be run token by token: nothing is certain before the end.
    AtEnd { decoders: Arc<[DecoderWrapper]>, tokens: Vec<String>, joined: bool },
}

impl TextStream {
    /// The stages of a decoder.
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> anyhow::Result<Self> {
        let Some(decoder) = decoder else { return Ok(Self { stages: vec![Stage::Spaced { first: true }] }) };
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut stages = Vec::new();
        // Whether all tokens are one by now, of which pieces arrive.
        let mut joined = false;
        for (at, &step) in steps.iter().enumerate() {
            let stage = match step {
                DecoderWrapper::Strip(strip) if strip.stop > 0 => anyhow::bail!(
                    "tokenizer.json strips the end of its tokens (decoder Strip with stop {}), which is not \
                     supported; set stop to 0",
                    strip.stop
                ),
                DecoderWrapper::Fuse(_) => {
                    joined = true;
                    continue;
                }
                DecoderWrapper::Strip(strip) if joined => {
                    Stage::StripText { content: strip.content, left: strip.start }
                }
                DecoderWrapper::Replace(_) | DecoderWrapper::Strip(_) if !joined => {
                    Stage::Each(Arc::new(step.clone()))
                }
                DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) if !joined => {
                    Stage::FirstDiffers { decoder: Arc::new(step.clone()), first: true }
                }
                DecoderWrapper::BPE(_) if !joined => {
                    Stage::LastDiffers { decoder: Arc::new(step.clone()), held: None }
                }
                DecoderWrapper::ByteFallback(_) if !joined => Stage::ByteFallback { run: Vec::new() },
                DecoderWrapper::ByteLevel(_) if !joined => {
                    joined = true;
                    Stage::ByteLevel { pending: Vec::new() }
                }
                _ => {
                    let decoders = steps[at..].iter().map(|&step| step.clone()).collect();
                    stages.push(Stage::AtEnd { decoders, tokens: Vec::new(), joined });
                    break;
                }
            };
            stages.push(stage);
        }
        Ok(Self { stages })
    }

    /// Takes the next token and returns the text that it makes certain: whole characters, often none.
    ///
    /// # Errors
    /// What the library cannot decode.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String, TokenizerError> {
        let mut out = String::new();
        if let Some(token) = tokenizer.written(token, Special::Skip) {
            feed(&mut self.stages, token, &mut out).map_err(failed)?;
        }
        Ok(out)
    }

    /// The rest, once no token follows; the stream is of no use behind it.
    ///
    /// # Errors
    /// As [`TextStream::push`].
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let mut out = String::new();
        finish(&mut self.stages, &mut out).map_err(failed)?;
        Ok(out)
    }
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Decode(error.to_string())
}

/// The steps of a chain that may hold chains.
fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().for_each(|step| flatten(step, steps));
        }
        step => steps.push(step),
    }
}

/// Sends one token (or, behind a joining step, one piece of text) through the stages.
fn feed(stages: &mut [Stage], token: String, out: &mut String) -> tokenizers::Result<()> {
    let Some((stage, rest)) = stages.split_first_mut() else {
        out.push_str(&token);
        return Ok(());
    };
    match stage {
        Stage::Each(decoder) => feed_all(rest, decoder.decode_chain(vec![token])?, out),
        Stage::FirstDiffers { decoder, first: first @ true } => {
            *first = false;
            feed_all(rest, decoder.decode_chain(vec![token])?, out)
        }
        Stage::FirstDiffers { decoder, first: false } => {
            let mut decoded = decoder.decode_chain(vec![String::new(), token])?;
            feed_all(rest, decoded.split_off(1), out)
        }
        Stage::LastDiffers { decoder, held } => match held.replace(token) {
            Some(before) => {
                let mut decoded = decoder.decode_chain(vec![before, String::new()])?;
                decoded.truncate(1);
                feed_all(rest, decoded, out)
            }
            None => Ok(()),
        },
        Stage::ByteFallback { run } => match byte_of(&token) {
            Some(byte) => {
                run.push(byte);
                Ok(())
            }
            None => {
                feed_all(rest, text_of_run(run), out)?;
                feed(rest, token, out)
            }
        },
        Stage::ByteLevel { pending } => {
            append_bytes(&token, pending);
            let text = take_text(pending);
            if text.is_empty() { Ok(()) } else { feed(rest, text, out) }
        }
        Stage::StripText { content, left } => {
            let mut text = token.as_str();
            while *left > 0 && !text.is_empty() {
                match text.strip_prefix(*content) {
                    Some(stripped) => (text, *left) = (stripped, *left - 1),
                    None => *left = 0,
                }
            }
            if text.is_empty() { Ok(()) } else { feed(rest, text.to_owned(), out) }
        }
        Stage::Spaced { first } => {
            let token = if std::mem::take(first) { token } else { format!(" {token}") };
            feed(rest, token, out)
        }
        Stage::AtEnd { tokens, joined, .. } => {
            match tokens.first_mut() {
                Some(text) if *joined => text.push_str(&token),
                _ => tokens.push(token),
            }
            Ok(())
        }
    }
}

fn feed_all(stages: &mut [Stage], tokens: Vec<String>, out: &mut String) -> tokenizers::Result<()> {
    tokens.into_iter().try_for_each(|token| feed(stages, token, out))
}

/// Sends on what the stages hold, from the first to the last.
fn finish(stages: &mut [Stage], out: &mut String) -> tokenizers::Result<()> {
    let Some((stage, rest)) = stages.split_first_mut() else { return Ok(()) };
    match stage {
        Stage::LastDiffers { decoder, held } => {
            if let Some(last) = held.take() {
                feed_all(rest, decoder.decode_chain(vec![last])?, out)?;
            }
        }
        Stage::ByteFallback { run } => feed_all(rest, text_of_run(run), out)?,
        Stage::ByteLevel { pending } => {
            if !pending.is_empty() {
                feed(rest, String::from_utf8_lossy(&std::mem::take(pending)).into_owned(), out)?;
            }
        }
        Stage::AtEnd { decoders, tokens, .. } => {
            let mut tokens = std::mem::take(tokens);
            if !tokens.is_empty() {
                for decoder in decoders.iter() {
                    tokens = decoder.decode_chain(tokens)?;
                }
            }
            feed_all(rest, tokens, out)?;
        }
        Stage::Each(_) | Stage::FirstDiffers { .. } | Stage::StripText { .. } | Stage::Spaced { .. } => {}
    }
    finish(rest, out)
}

/// The byte of a token like `<0x0A>`.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Empties a run of bytes into the tokens that it makes.
fn text_of_run(run: &mut Vec<u8>) -> Vec<String> {
    match String::from_utf8(std::mem::take(run)) {
        Ok(text) if text.is_empty() => Vec::new(),
        Ok(text) => vec![text],
        Err(error) => vec!["\u{fffd}".to_owned(); error.as_bytes().len()],
    }
}

/// The bytes for which the characters of a token stand; a token with any other character (an added token)
/// stands for itself.
fn append_bytes(token: &str, bytes: &mut Vec<u8>) {
    let before = bytes.len();
    for c in token.chars() {
        match byte_of_char(c) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(before);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet: a byte that is a visible character in Latin-1 is that character, the other 68 are, in
/// their order, the characters from U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '¡'..='¬' | '®'..='ÿ' => u8::try_from(u32::from(c)).ok(),
        '\u{100}'..='\u{143}' => match u32::from(c) as usize - 0x100 {
            n @ 0..=32 => Some(n as u8),
            n @ 33..=66 => Some((n - 33 + 127) as u8),
            _ => Some(173),
        },
        _ => None,
    }
}

/// Takes off the text that is certain: everything but the beginning of a character at the end.
fn take_text(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, behind) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = behind;
                match error.error_len() {
                    Some(invalid) => {
                        text.push('\u{fffd}');
                        rest = &rest[invalid..];
                    }
                    None => break,
                }
            }
        }
    }
    *pending = rest.to_vec();
    text
}
