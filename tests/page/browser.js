// What the scripts here share: a browser that reports whatever its console says, axe, and a validator.
'use strict';
const fs = require('node:fs');
const path = require('node:path');
const {chromium} = require('playwright-core');
const {HtmlValidate} = require('html-validate');

const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const WIDE = {width: 1280, height: 900};
const PHONE = {width: 375, height: 740};

const findings = [];
// Notes what is wrong, so that one run tells everything.
function expect(holds, text) {
  if (holds) return;
  findings.push(text);
  console.error('not so: ' + text);
}

// Ends the script, with 1 if anything was found.
async function end(browser) {
  await browser.close();
  process.exit(findings.length ? 1 : 0);
}

function start() {
  // Its sandbox does not start in containers, where tests run as root.
  return chromium.launch({executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--no-sandbox']});
}

// A page of its own profile. What its console says, and what it asks of others, are findings; `expected` is a
// pattern of lines that the test causes on purpose.
async function open(browser, options = {}, expected = null) {
  const context = await browser.newContext({viewport: WIDE, locale: 'en-GB', timezoneId: 'Europe/London', ...options});
  const page = await context.newPage();
  const said = text => expect(expected && expected.test(text), 'the console says: ' + text);
  page.on('console', message => said(message.text()));
  page.on('pageerror', error => said(String(error)));
  page.on('dialog', dialog => {
    expect(false, 'a script from outside ran: ' + dialog.message());
    dialog.dismiss();
  });
  return page;
}

async function accessible(page, name) {
  const {violations} = await page.evaluate(axe + '; axe.run(document, {resultTypes: ["violations"]})');
  for (const {id, nodes} of violations) {
    for (const node of nodes.slice(0, 3)) expect(false, `${name}: axe ${id}: ${node.html.slice(0, 200)} ${node.failureSummary}`);
  }
}

const validator = new HtmlValidate({
  extends: ['html-validate:recommended', 'html-validate:document', 'html-validate:a11y'],
  rules: {
    // The host's name may be long.
    'long-title': 'off',
    // The icon is in the page itself.
    'require-sri': 'off',
    // A region that is scrolled is no section of the page.
    'prefer-native-element': 'off',
  },
});
async function valid(html, name) {
  const report = await validator.validateString(html);
  for (const result of report.results) {
    for (const {ruleId, message, line, column, selector} of result.messages.slice(0, 20)) {
      expect(false, `${name}:${line}:${column}: ${ruleId}: ${message} at ${selector}`);
    }
  }
}

// The page must not be wider than the window.
async function fits(page, name) {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  expect(content <= window, `${name}: the page is ${content} wide in a window of ${window}`);
}

const picture = (page, folder, name, fullPage = true) =>
  page.screenshot({path: path.join(folder, name + '.png'), fullPage, animations: 'disabled'});

module.exports = {PHONE, WIDE, accessible, end, expect, fits, open, picture, start, valid};
