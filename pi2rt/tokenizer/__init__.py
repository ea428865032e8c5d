"""Text to token ids and back, and chat templates."""

from pi2rt.tokenizer.chat_template import ChatTemplate
from pi2rt.tokenizer.detokenizer import Detokenizer
from pi2rt.tokenizer.load import load_tokenizer
from pi2rt.tokenizer.marked_text import RenderedChat
from pi2rt.tokenizer.stop_matcher import StopMatcher
from pi2rt.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "RenderedChat", "StopMatcher", "Tokenizer", "load_tokenizer"]
