-- The pandoc filter of pdf.py: turns HTML classes into calls of pdf.typ's functions.

local function raw(text) return pandoc.RawBlock('typst', text) end
local function inline(text) return pandoc.RawInline('typst', text) end

local colours = {
  warning = 'orange', caution = 'orange', attention = 'orange', danger = 'red',
  error = 'red', tip = 'green', hint = 'green', important = 'purple',
  exercise = 'blue', solution = 'gray', note = 'teal',
}
local boxes = { cell_output = '#cellout[', lstcap = '#lstcap[', exported = '#shipped[' }

local function enclose(open, blocks, content)
  blocks:insert(raw(open))
  blocks:extend(content)
  blocks:insert(raw(']'))
  return blocks
end

function Div(div)
  local classes, blocks = div.classes, pandoc.List()
  if classes:includes('equation') then
    local formula = pandoc.Pandoc({ pandoc.Para({ div.content[1].content[1] }) })
    local source = pandoc.write(formula, 'typst'):gsub('%s+$', '')
    local number = div.attributes['no'] or ''
    local label = div.identifier ~= '' and ' <' .. div.identifier .. '>' or ''
    local open = number ~= '' and '#num("' .. number .. '")[' or '#['
    blocks:insert(raw(open .. source .. label .. ']'))
    return blocks
  end
  if div.identifier ~= '' then
    blocks:insert(raw('#metadata(none) <' .. div.identifier .. '>'))
  end
  if classes:includes('admonition') then
    local colour = 'teal'
    for _, name in ipairs(classes) do colour = colours[name] or colour end
    local title = div.content:remove(1) -- never alone at the end of a page
    blocks:insert(raw('#admon(' .. colour .. ')[#block(sticky: true)['))
    blocks:insert(title)
    return enclose(']', blocks, div.content)
  end
  for _, name in ipairs(classes) do
    if boxes[name] then return enclose(boxes[name], blocks, div.content) end
  end
  blocks:extend(div.content)
  return blocks
end

-- Labels come from the divs around headings; Sphinx numbers the headings.
function Header(header)
  header.identifier = ''
  return header
end

function Span(span)
  if span.identifier == '' then return span.content end
  local inlines = pandoc.List({ inline('#metadata(none) <' .. span.identifier .. '>') })
  inlines:extend(span.content)
  return inlines
end

function Link(link)
  link.attributes, link.classes = {}, {}
  return link
end
