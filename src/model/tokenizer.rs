//! The tokenizer of a model folder: `tokenizer.json`, `tokenizer_config.json`, the chat template. Text to token
//! ids and back, for whole texts and, through [`TextStream`], token by token. Knows nothing of models or
//! requests.

mod text_stream;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;
use tokenizers::{AddedToken, Decoder, Model};

pub use self::text_stream::TextStream;
use super::chat_template::ChatTemplate;

/// Whether the post-processor of `tokenizer.json` adds its tokens (usually one at the beginning).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddSpecial {
    /// As for a prompt in plain text.
    Yes,
    /// As for a rendered chat, which has its special tokens already.
    No,
}

/// Whether special tokens are written out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Leave them out: the text of an answer.
    Skip,
    /// Write them as they are spelled.
    Keep,
}

/// A text or a sequence of ids that the tokenizer cannot work on; the message is the library's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// Text to ids.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// Ids to text.
    #[error("the tokens cannot be turned into text: {0}")]
    Decode(String),
}

/// Text to token ids and back; immutable, shared by every thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Spelling of the special tokens that have a role, by `bos_token`, `eos_token`, ….
    roles: BTreeMap<&'static str, String>,
    chat_template: Option<ChatTemplate>,
    stream: TextStream,
    vocab_size: usize,
}

/// The keys under which `tokenizer_config.json` and `special_tokens_map.json` name special tokens.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A special token as the files spell it: its text, or an object with its text.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Object { content: String },
}

impl TokenText {
    fn into_text(self) -> String {
        match self {
            Self::Plain(text) | Self::Object { content: text } => text,
        }
    }
}

/// A chat template as `tokenizer_config.json` holds it: one, or a list of named ones.
#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateText {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// What is read of `tokenizer_config.json`; the rest is for Python.
#[derive(Deserialize, Default)]
struct Config {
    chat_template: Option<TemplateText>,
    /// Ids and spellings of added tokens. Where it is present, `special_tokens_map.json` is not read.
    added_tokens_decoder: Option<BTreeMap<u32, ConfigToken>>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct ConfigToken {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// The bytes of the files of a tokenizer; only the first must be there.
#[derive(Default)]
struct Files<'a> {
    tokenizer: &'a [u8],
    config: Option<&'a [u8]>,
    special_tokens_map: Option<&'a [u8]>,
    chat_template: Option<&'a str>,
}

impl Tokenizer {
    /// Reads a model folder: `tokenizer.json`, and where they are there `tokenizer_config.json`,
    /// `special_tokens_map.json` and `chat_template.jinja` (which goes before the template in the
    /// configuration) or the older `chat_template.json`.
    ///
    /// As in transformers 5, what is put around a text is decided by the post-processor in `tokenizer.json`
    /// alone: `add_bos_token` and `add_eos_token` of the configuration are for tokenizers without that file.
    /// Truncation and padding that the file asks for are switched off.
    ///
    /// # Errors
    /// A file that is missing, unreadable or no such file, by name; a chat template that does not compile.
    pub fn from_dir(dir: &Path) -> anyhow::Result<Self> {
        let tokenizer = read_optional(dir, "tokenizer.json")?.with_context(|| {
            format!(
                "{} has no tokenizer.json; the model folder must hold the tokenizer in the format of Hugging Face \
                 (a tokenizer.model alone can be converted by saving it with transformers' AutoTokenizer)",
                dir.display()
            )
        })?;
        let config = read_optional(dir, "tokenizer_config.json")?;
        let special_tokens_map = read_optional(dir, "special_tokens_map.json")?;
        let chat_template = match read_optional(dir, "chat_template.jinja")? {
            Some(bytes) => Some(
                String::from_utf8(bytes)
                    .with_context(|| format!("{} is not UTF-8", dir.join("chat_template.jinja").display()))?,
            ),
            None => read_optional(dir, "chat_template.json")?
                .map(|bytes| template_of_json(&bytes))
                .transpose()
                .with_context(|| format!("{} is not valid", dir.join("chat_template.json").display()))?,
        };
        Self::from_files(Files {
            tokenizer: &tokenizer,
            config: config.as_deref(),
            special_tokens_map: special_tokens_map.as_deref(),
            chat_template: chat_template.as_deref(),
        })
        .with_context(|| format!("the tokenizer in {}", dir.display()))
    }

    /// As [`Tokenizer::from_dir`], of files in memory. `chat_template` goes before that of the configuration.
    ///
    /// # Errors
    /// As for a folder.
    pub fn from_parts(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
        chat_template: Option<&str>,
    ) -> anyhow::Result<Self> {
        Self::from_files(Files {
            tokenizer: tokenizer_json,
            config: tokenizer_config_json,
            special_tokens_map: None,
            chat_template,
        })
    }

    fn from_files(files: Files) -> anyhow::Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(files.tokenizer).map_err(|error| {
            anyhow::anyhow!(
                "tokenizer.json cannot be read: {error}; it may be cut off or of another format, fetch it again"
            )
        })?;
        // The length of a prompt is checked elsewhere, where it can be refused; here it must never shrink.
        inner.with_truncation(None).map_err(|error| anyhow::anyhow!("tokenizer.json: {error}"))?;
        inner.with_padding(None);

        let config: Config = match files.config {
            Some(bytes) => parse(bytes, "tokenizer_config.json")?,
            None => Config::default(),
        };
        let legacy: serde_json::Map<String, serde_json::Value> = match files.special_tokens_map {
            Some(bytes) if config.added_tokens_decoder.is_none() => parse(bytes, "special_tokens_map.json")?,
            _ => serde_json::Map::new(),
        };
        let mut roles = BTreeMap::new();
        for role in ROLES {
            let value = legacy.get(role).or_else(|| config.rest.get(role)).filter(|value| !value.is_null());
            if let Some(value) = value {
                let text = TokenText::deserialize(value).map_err(|_| {
                    anyhow::anyhow!(
                        "{role} in tokenizer_config.json must be a text or an object with \"content\""
                    )
                })?;
                roles.insert(role, text.into_text());
            }
        }
        add_tokens(&mut inner, config.added_tokens_decoder.unwrap_or_default(), &roles)?;

        let of_config = config.chat_template.and_then(TemplateText::default_template);
        let chat_template = files
            .chat_template
            .map(str::to_owned)
            .or(of_config)
            .map(|source| ChatTemplate::new(&source, roles.iter().map(|(&k, v)| (k, v.as_str()))))
            .transpose()
            .context("the chat template cannot be used; correct or remove it")?;

        let stream = TextStream::new(inner.get_decoder())?;
        let added = inner.get_added_vocabulary().get_added_tokens_decoder().keys().copied().max();
        let highest = inner.get_model().get_vocab().into_values().max().max(added);
        let vocab_size = highest.map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            bail!("tokenizer.json has an empty vocabulary");
        }
        Ok(Self { inner, roles, chat_template, stream, vocab_size })
    }

    /// The ids of a text. Special tokens that are spelled out in the text become their ids.
    ///
    /// # Errors
    /// What the library cannot tokenize.
    pub fn encode(&self, text: &str, add_special: AddSpecial) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special == AddSpecial::Yes);
        Ok(encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?.get_ids().to_vec())
    }

    /// The text of ids. Ids outside the vocabulary have none. `clean_up_tokenization_spaces` is not applied:
    /// it would take out characters that the model wrote.
    ///
    /// # Errors
    /// What the library cannot decode.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, TokenizerError> {
        let tokens: Vec<String> = ids.iter().filter_map(|&id| self.written(id, special)).collect();
        match self.inner.get_decoder() {
            // Some decoders of the library take it for granted that there is a token.
            _ if tokens.is_empty() => Ok(String::new()),
            Some(decoder) => {
                decoder.decode(tokens).map_err(|error| TokenizerError::Decode(error.to_string()))
            }
            None => Ok(tokens.join(" ")),
        }
    }

    /// For decoding one answer token by token, special tokens left out.
    pub fn text_stream(&self) -> TextStream {
        self.stream.clone()
    }

    /// The token as it goes into the decoder; `None` for one that leaves no trace.
    fn written(&self, id: u32, special: Special) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        let skip = special == Special::Skip && self.inner.get_added_vocabulary().is_special_token(&token);
        (!skip).then_some(token)
    }

    /// Highest id plus one, added tokens included: rows that an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token that is spelled as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that begins a text, where the model has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.id_of_role("bos_token")
    }

    /// The token that ends a text. `generation_config.json` may name more of them.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.id_of_role("eos_token")
    }

    /// The token that fills rows of a batch.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.id_of_role("pad_token")
    }

    fn id_of_role(&self, role: &str) -> Option<u32> {
        self.token_id(self.roles.get(role)?)
    }

    /// How a conversation becomes a prompt, where the model was made for conversations.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }
}

impl TemplateText {
    /// The template for plain conversations.
    fn default_template(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => {
                templates.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

/// Tells the library of tokens that only the configuration declares, as transformers does: those of
/// `added_tokens_decoder` that are new, and named special tokens that the vocabulary holds as plain ones.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    declared: BTreeMap<u32, ConfigToken>,
    roles: &BTreeMap<&'static str, String>,
) -> anyhow::Result<()> {
    let failed = |error| anyhow::anyhow!("tokenizer_config.json: {error}");
    for (id, token) in declared {
        if inner.token_to_id(&token.content).is_some() {
            continue;
        }
        let added = AddedToken::from(token.content.clone(), token.special)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .single_word(token.single_word)
            .normalized(token.normalized);
        inner.add_tokens([added]).map_err(failed)?;
        let given = inner.token_to_id(&token.content);
        if given != Some(id) {
            bail!(
                "tokenizer_config.json gives the token {:?} the id {id}, but after tokenizer.json the next free \
                 id is {given:?}; the two files are not of the same tokenizer",
                token.content
            );
        }
    }
    for text in roles.values() {
        if inner.token_to_id(text).is_some() && !inner.get_added_vocabulary().is_special_token(text) {
            let special = AddedToken::from(text.clone(), true).normalized(false);
            inner.add_special_tokens([special]).map_err(failed)?;
        }
    }
    Ok(())
}

/// The `chat_template` of the older `chat_template.json`.
fn template_of_json(bytes: &[u8]) -> anyhow::Result<String> {
    #[derive(Deserialize)]
    struct Holder {
        chat_template: TemplateText,
    }
    let holder: Holder = serde_json::from_slice(bytes)?;
    holder.chat_template.default_template().context("none of its templates is named \"default\"")
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], name: &str) -> anyhow::Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("{name} is not valid; fetch it again"))
}

/// The bytes of a file that need not be there.
fn read_optional(dir: &Path, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

#[cfg(test)]
pub(crate) mod tests;
