'use strict';
(() => {
  const EVERY = 5000;
  const $ = id => document.getElementById(id);
  // Not from document.baseURI: it holds the token if that was typed into the address, and then no request may be made with it.
  const here = path => location.origin + path;
  document.documentElement.classList.add('js');

  // Times as the reader's clock shows them. The server's are UTC.
  const day = new Intl.DateTimeFormat(undefined, {day: 'numeric', month: 'short'});
  const utc = new Intl.DateTimeFormat(undefined, {day: 'numeric', month: 'short', year: 'numeric', timeZone: 'UTC'});
  const year = new Intl.DateTimeFormat(undefined, {day: 'numeric', month: 'short', year: 'numeric'});
  const clock = new Intl.DateTimeFormat(undefined, {hour: '2-digit', minute: '2-digit', second: '2-digit'});
  const hour = new Intl.DateTimeFormat(undefined, {hour: '2-digit', minute: '2-digit'});
  function local(time, now) {
    const written = time.getAttribute('datetime'), at = new Date(written);
    if (isNaN(at)) return;
    if (!written.includes('T')) {
      // Sums are of days of UTC.
      time.textContent = utc.format(at);
      return;
    }
    const today = at.toDateString() === now.toDateString();
    const short = time.closest('tbody') ? clock : hour;
    const date = at.getFullYear() === now.getFullYear() ? day : year;
    time.textContent = today ? short.format(at) : date.format(at) + ', ' + hour.format(at);
    time.title = at.toString();
  }

  // What this browser remembers of the ledger: an old copy that is put back has a smaller number, or another hash.
  function remember(page) {
    const head = page.getElementById('head'), said = page.getElementById('remembered');
    if (!head) return;
    const {seq, hash} = head.dataset;
    let known = null;
    try { known = JSON.parse(localStorage.getItem('head')); } catch { return; }
    const wrong = known && (Number(seq) < known.seq || (Number(seq) === known.seq && hash !== known.hash));
    if (wrong) {
      said.className = 'state bad';
      said.textContent = `This is not the ledger that this browser saw at ${new Date(known.at).toLocaleString()}: that had reached ` +
        `${known.seq}:${known.hash}. Unless you have started anew, an old copy was put back, or rows were removed. `;
      const anew = page.createElement('button');
      anew.type = 'button';
      anew.dataset.anew = '';
      anew.textContent = 'Remember this one';
      said.after(anew);
      return;
    }
    said.textContent = known ? 'It has grown from the one that this browser remembers.' : 'This browser remembers it from now on.';
    try { localStorage.setItem('head', JSON.stringify({seq: Number(seq), hash, at: Date.now()})); } catch { /* private window */ }
  }

  // To be done to each page before it is shown.
  function prepare(page) {
    const now = new Date();
    for (const time of page.querySelectorAll('time')) local(time, now);
    remember(page);
  }

  // Makes `old` like `fresh` and keeps the elements that are in both, so that focus, open menus and scrolling stay.
  function change(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== 1) {
      old.data = fresh.data;
      return;
    }
    for (const {name, value} of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const {name} of [...old.attributes]) {
      // The reader opens, and what is being done stays marked.
      if (!fresh.hasAttribute(name) && name !== 'open' && name !== 'aria-disabled') old.removeAttribute(name);
    }
    const ids = new Set();
    for (const child of fresh.children) if (child.id) ids.add(child.id);
    for (const child of [...old.children]) if (child.id && !ids.has(child.id)) child.remove();
    let at = old.firstChild;
    for (const child of fresh.childNodes) {
      let same = null;
      if (child.id) same = [...old.children].find(other => other.id === child.id);
      else if (at && !at.id && at.nodeName === child.nodeName) same = at;
      if (!same) {
        old.insertBefore(document.importNode(child, true), at);
      } else {
        if (same === at) at = at.nextSibling;
        else old.insertBefore(same, at);
        change(same, child);
      }
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  function show(page) {
    if (page.querySelector('script').textContent !== document.querySelector('script').textContent) {
      // The service has been updated.
      location.reload();
      return;
    }
    prepare(page);
    for (const name of ['title', 'link[rel=icon]', 'header', 'main']) {
      change(document.querySelector(name), page.querySelector(name));
    }
    offline('');
  }

  function offline(text) {
    if ($('offline').textContent !== text) $('offline').textContent = text;
    if (text && !document.title.startsWith('Offline')) document.title = 'Offline – ' + document.title;
  }

  // A page whose filters make the service read all rows is asked for less often.
  let timer = 0, took = 0, asking = null, seen = new Date();
  function refresh() {
    clearTimeout(timer);
    if (asking) asking.abort();
    // Not fetch: this parses the page without running anything in it, which trusted types would forbid to a parser.
    const request = asking = new XMLHttpRequest();
    request.open('GET', here(location.pathname + location.search));
    request.responseType = 'document';
    request.timeout = 15000;
    const began = performance.now();
    request.onloadend = () => {
      if (asking !== request) return;
      asking = null;
      took = performance.now() - began;
      const page = request.response;
      if (request.status === 200 && page && page.getElementById('main')) {
        seen = new Date();
        show(page);
      } else if (request.status === 401) {
        offline('This token is no longer good. “export-service link” prints a new one; then load this page again.');
        return;
      } else if (request.status) {
        offline(`The service cannot show this page (status ${request.status}), so you see how things were at ${clock.format(seen)}. Its log says why.`);
      } else {
        offline(`The service does not answer, so you see how things were at ${clock.format(seen)}. This page keeps trying.`);
      }
      later();
    };
    request.send();
  }
  function later() {
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(refresh, Math.max(EVERY, 20 * took));
  }
  document.addEventListener('visibilitychange', () => document.hidden ? clearTimeout(timer) : refresh());

  // What an act has led to. Read out, and there until it is read.
  let fading = 0;
  function say(text, failed) {
    clearTimeout(fading);
    const close = document.createElement('button');
    close.type = 'button';
    close.textContent = 'Close';
    close.addEventListener('click', () => $('said').replaceChildren());
    const words = document.createElement('span');
    words.textContent = visible(text);
    $('said').replaceChildren(words, close);
    if (!failed) fading = setTimeout(() => $('said').replaceChildren(), 12000);
  }

  // As the server shows texts from outside.
  const visible = text => String(text).replace(
    /[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f]/gu,
    c => c === '\n' ? c : `\\u{${c.codePointAt(0).toString(16)}}`);

  // Asks, and resolves to null, or to what was typed.
  function ask(text, yes, field, body) {
    const dialog = $('ask');
    $('ask-text').textContent = visible(text);
    $('ask-body').textContent = body === undefined ? '' : visible(body);
    $('ask-body').hidden = body === undefined;
    $('ask-label').hidden = field === undefined;
    $('ask-name').value = field || '';
    $('ask-yes').textContent = yes || '';
    $('ask-yes').hidden = !yes;
    $('ask-no').textContent = yes ? 'Leave it as it is' : 'Close';
    dialog.returnValue = '';
    dialog.showModal();
    (field !== undefined ? $('ask-name') : $('ask-no')).focus();
    return new Promise(answered => dialog.addEventListener('close',
      () => answered(dialog.returnValue === 'yes' ? $('ask-name').value : null), {once: true}));
  }

  const morning = () => {
    const at = new Date();
    at.setDate(at.getDate() + 1);
    at.setHours(8, 0, 0, 0);
    return Math.round((at - Date.now()) / 1000) + 's';
  };

  // What follows from an act that is asked about.
  const CONSEQUENCES = {
    cancel: ' What is cancelled is never sent, and its app is told.',
    forget: ' What waits is cancelled and never sent. Results, payloads and the details of its rows in the ledger are erased. ' +
      'What has left cannot be called back, and this cannot be undone.',
    label: ' The name is shown beside it. Without one, the old name is removed.',
  };

  async function act(button) {
    const {act, body, ask: question, yes, name} = button.dataset;
    const data = JSON.parse(body);
    if (question) {
      const typed = await ask(question + (CONSEQUENCES[act] || ''), yes, name);
      if (typed === null) return;
      if (name !== undefined) data.label = typed.trim();
    }
    if ('morning' in button.dataset) data.for = morning();
    button.setAttribute('aria-disabled', 'true');
    try {
      const answer = await fetch(here('/api/' + act), {
        method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(data),
      });
      const told = await answer.json().catch(() => ({}));
      if (!answer.ok) say(told.error?.message || `This did not work (status ${answer.status}): the service’s log says why.`, true);
      else if (told.payload !== undefined) await ask(told.done + (told.uri ? `\n${told.uri}` : ''), '', undefined, told.payload);
      else say(told.done || 'Done.');
    } catch {
      say('The service does not answer, so this may not have been done. Try again once it does.', true);
    }
    button.removeAttribute('aria-disabled');
    refresh();
  }

  document.addEventListener('click', event => {
    const button = event.target.closest('button');
    const menu = event.target.closest('.menu');
    for (const other of document.querySelectorAll('.menu[open]')) if (other !== menu) other.open = false;
    if (button && 'anew' in button.dataset) {
      localStorage.removeItem('head');
      refresh();
    }
    if (!button || !button.dataset.act || button.hasAttribute('aria-disabled')) return;
    if (menu) {
      menu.open = false;
      menu.querySelector('summary').focus();
    }
    act(button);
  });
  document.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return;
    for (const menu of document.querySelectorAll('.menu[open]')) {
      menu.open = false;
      menu.querySelector('summary').focus();
    }
  });

  prepare(document);
  later();
})();
